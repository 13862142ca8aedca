"""The price of a plan: what operations cost, what a machine can do, and how plans are ranked.

Goes in: operations with their dimensions, and a device. Comes out: seconds, FLOPs, or a reason to
leave a graph alone. The modules here import no torch; those of :mod:`.devices` do, for they ask
devices and measure. Nothing here knows of graphs or plans; everyone may import it.
"""
