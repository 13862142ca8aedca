"""Engines: several real processes train one adapted Llama through what torch and its friends offer.

    python -m tests.engines            all engines, a table
    python -m tests.engines ddp tp     two of them

Every engine is compared with one process that trains eagerly on the same global batch.
"""
