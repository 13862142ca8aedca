"""Fused kernels for GPUs, written in Triton. Without Triton the package offers nothing.

    from runlora_fx import kernels
    m = kernels.merge(w, b, a, scale=2.0)                  # w + 2 b a; w read once, m written once
    z, g = kernels.gradient_products(dy, b, s)             # dy b and dy' s; dy read once
    y = kernels.two_products(x, w, s, b)                   # x w' + s b', one accumulator

They are operators of ``torch.ops.runlora``. They run Triton's programs on CUDA devices (and in
Triton's interpreter), and torch's own operators everywhere else. Plans have the merge where the
device's times say that it is faster than ``addmm``, and none of the others.

Invariant: an operator computes what the plain operators compute, up to rounding.
"""

__all__: list[str] = []

try:
    import triton  # noqa: F401
except ImportError:
    pass
else:
    from runlora_fx.kernels.gradient_products import gradient_products
    from runlora_fx.kernels.merge import merge
    from runlora_fx.kernels.two_products import two_products

    __all__ += ["gradient_products", "merge", "two_products"]
