"""Known names: closed lists of functions and operators whose effects are known.

A function of torch is pure if its name is listed here:

    F.relu     PURE_AND_FRESH     the same result for the same arguments, in new memory
    x.view     PURE_AND_VIEWS     the same, but maybe in the memory of an argument
    F.glu      not listed         nothing is known: never merged, never moved

Invariant: a name is in a list only if it is true of every function of torch with that name.
"""

from __future__ import annotations

from runlora_fx.passes.levels import operators


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Functions and methods of torch whose result is new memory, determined by their arguments.
PURE_AND_FRESH = operators.names_of(
    operators.PRODUCTS | operators.COMPOSED_PRODUCTS | operators.REDUCTIONS
) | _names(
    "__matmul__ einsum outer "
    "add sub rsub mul multiply div divide true_divide truediv neg negative pow abs sign "
    "exp expm1 log log1p sqrt rsqrt reciprocal square sin cos tanh sigmoid erf "
    "relu relu6 gelu silu mish elu selu celu leaky_relu softplus hardtanh hardswish hardsigmoid "
    "softmax log_softmax logsigmoid layer_norm rms_norm group_norm normalize "
    "prod std norm cumsum "
    "eq ne lt le gt ge maximum minimum clamp where masked_fill isnan logical_not "
    "cat stack clone tril triu zeros_like ones_like full_like "
    "eye zeros ones full arange embedding conv1d conv2d conv3d"
)

#: Functions and methods of torch that convert a tensor to another dtype.
CASTS = operators.names_of(operators.CASTS) | _names("type float half bfloat16 double")

#: Functions and methods of torch that return their argument, a view of it, a copy, or no tensor.
PURE_AND_VIEWS = (
    CASTS
    | operators.names_of(operators.VIEWS)
    | _names(
        "view_as reshape_as flatten unflatten swapaxes swapdims movedim expand_as broadcast_to "
        "narrow chunk split unbind getitem getattr contiguous type_as size dim numel sym_size"
    )
)

#: Factories of uninitialised tensors, whose values are not determined.
UNINITIALISED = _names(
    "empty empty_like empty_strided empty_permuted new_empty new_empty_strided resize"
)

#: Random functions of ``torch.nn.functional`` that no ATen operator carries the name of.
RANDOM = _names(
    "gumbel_softmax dropout1d dropout2d dropout3d fractional_max_pool2d fractional_max_pool3d "
    "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices "
    "multi_head_attention_forward rand_like randn_like randint_like seed manual_seed"
)

#: Functions that are pure if they drop nothing.
DROPOUTS = frozenset(["dropout"])

#: The augmented assignments and the item assignment of the operator module.
IN_PLACE_OPERATORS = _names(
    "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor "
    "setitem delitem"
)

#: Operators whose schema does not say that they update running statistics.
UPDATES_STATISTICS = _names(
    "batch_norm instance_norm native_batch_norm cudnn_batch_norm miopen_batch_norm "
    "_batch_norm_impl_index"
)
STATISTICS = ("running_mean", "running_var")
TRAINING = ("training", "train", "use_input_stats")

#: Operators that return a view although their schema does not say so.
UNDECLARED_VIEWS = _names("_unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk lift")

#: Namespaces whose operators have true tags and schemas. Operators of others do not count as pure.
TRUSTED_NAMESPACES = _names(
    "aten prims runlora bitsandbytes transformers torchao quantized_decomposed"
)

#: Higher-order operators that modify nothing, and call no graph that could.
FUNCTIONAL = frozenset(
    ["auto_functionalized", "auto_functionalized_v2", "triton_kernel_wrapper_functional"]
)
