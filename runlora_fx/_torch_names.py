"""Private names of torch: every one that the package uses, imported here and nowhere else.

Example: ``from runlora_fx._torch_names import inductor_config``.

torch may change them between versions without notice. ``tests/test_torch_names.py`` looks up each
in the installed torch and says which ones are missing. Differences between the versions that we
support are in ``_torch_compat.py``, which gives these names meanings of ours.

Invariant: nothing else is in this module. What takes long to import is imported when it is asked
for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from functorch.compile import make_boxed_func
from torch import Tensor, _TorchCompileInductorWrapper, _TorchCompileWrapper
from torch._C import (
    DispatchKey,
    _DisablePythonDispatcher,
    _DisableTorchDispatch,
    _set_throw_on_mutable_data_ptr,
    _set_warn_deprecated_on_mutable_data_ptr,
)
from torch._C._dynamo.eval_frame import get_eval_frame_callback, reset_code
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, pgo
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import _TorchDynamoContext, skip_code
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import get_debug_dir
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.logging_utils import get_aot_graph_name
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile as compile_fx_graph
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder, custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._logging import _internal as torch_logging
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import proxy as fx_proxy
from torch.fx.node import _get_qualified_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.functions import FloorDiv, Max
from torch.utils._sympy.printers import PythonPrinter

make_subclass = Tensor._make_subclass

if TYPE_CHECKING:
    from torch._inductor.codegen.triton import TritonOverrides
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.virtualized import V
    from torch.distributed.distributed_c10d import _get_default_store

#: Names whose modules take long to import, or are not in every build of torch.
_LATER = {
    "TritonOverrides": "torch._inductor.codegen.triton",
    "V": "torch._inductor.virtualized",
    "_get_default_store": "torch.distributed.distributed_c10d",
    "fallback_handler": "torch._inductor.lowering",
    "register_lowering": "torch._inductor.lowering",
    "select_decomp_table": "torch._inductor.decomposition",
}

__all__ = [
    "ConstantSource",
    "CppCompileError",
    "CustomGraphPass",
    "DispatchKey",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "InstructionTranslator",
    "InvalidCxxCompiler",
    "Max",
    "OpOverload",
    "PythonPrinter",
    "TritonOverrides",
    "V",
    "_DisablePythonDispatcher",
    "_DisableTorchDispatch",
    "_TorchCompileInductorWrapper",
    "_TorchCompileWrapper",
    "_TorchDynamoContext",
    "_disable_current_modes",
    "_get_default_store",
    "_get_qualified_name",
    "_set_throw_on_mutable_data_ptr",
    "_set_warn_deprecated_on_mutable_data_ptr",
    "aot_autograd",
    "cache_dir",
    "compile_fx_graph",
    "convert_frame",
    "cpp_builder",
    "custom_graph_pass",
    "dynamo_config",
    "dynamo_utils",
    "enable_python_dispatcher",
    "fallback_handler",
    "functorch_config",
    "fx_proxy",
    "get_aot_graph_name",
    "get_debug_dir",
    "get_eval_frame_callback",
    "get_hash_for_files",
    "inductor_config",
    "make_boxed_func",
    "make_subclass",
    "min_cut_rematerialization_partition",
    "pgo",
    "pytree",
    "register_lowering",
    "reset_code",
    "select_decomp_table",
    "skip_code",
    "torch_logging",
]


def __getattr__(name: str) -> Any:
    """Import a name now.

    Raises:
        AttributeError: If it is none of these names, or the installed torch lacks it.
    """
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        raise AttributeError(f"torch lacks {_LATER[name]}.{name}: {error}") from error
