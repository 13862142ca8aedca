"""PyTorch's own samples of its operators (OpInfo), each between two low-rank layers.

    python -m tests.opinfo --op mm --op bmm
    python -m tests.opinfo --backend runlora --samples 1

The samples come from the torch that is installed. A program is ``y = lora(op(lora(t), ...))``: the
low-rank layers ``x W + (x A) B`` stand where shapes and the operator allow, so that the pass has a
region beside every operator. Values and gradients are compared with those of eager mode, under
``runlora.strict``. What fails alike under ``aot_eager`` or ``inductor`` is counted as torch's.

Workers run the operators. One that dies, or takes longer than ``--seconds`` for an operator, is
replaced, and the operator is listed. Needs the package ``expecttest``, which torch imports there.
"""
