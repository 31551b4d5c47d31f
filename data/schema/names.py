"""Which names a field, a table and a group may have, and what a table is called that its field does not name.

Names become names of files, and a table's name that of a torch module: a part of a dotted path, which must not hide what a module has.
"""

import hashlib
import unicodedata
from collections.abc import Iterable

MAX_STEM_BYTES = 200  # disks take 255 with the ending
MAX_NAME_BYTES = 500  # a checkpoint's names, which hold those of tables, have a limit
SHORT_STEM = 40  # characters
# What torch's ModuleDict, which holds the tables, has of its own and so takes for no module. A test compares it with the torch installed.
_ATTRIBUTES = """
    T_destination __annotations__ __call__ __class__ __contains__ __delattr__ __delitem__ __dict__ __dir__ __doc__ __eq__ __format__
    __ge__ __getattr__ __getattribute__ __getitem__ __getstate__ __gt__ __hash__ __init__ __init_subclass__ __iter__ __le__ __len__
    __lt__ __module__ __ne__ __new__ __reduce__ __reduce_ex__ __repr__ __setattr__ __setitem__ __setstate__ __sizeof__ __str__
    __subclasshook__ __weakref__ _apply _backward_hooks _backward_pre_hooks _buffers _call_impl _compiled_call_impl _forward_hooks
    _forward_hooks_always_called _forward_hooks_with_kwargs _forward_pre_hooks _forward_pre_hooks_with_kwargs _get_backward_hooks
    _get_backward_pre_hooks _get_name _is_full_backward_hook _load_from_state_dict _load_state_dict_post_hooks
    _load_state_dict_pre_hooks _maybe_warn_non_full_backward_hook _modules _named_members _non_persistent_buffers_set _parameters
    _register_load_state_dict_pre_hook _register_state_dict_hook _replicate_for_data_parallel _save_to_state_dict _slow_forward
    _state_dict_hooks _state_dict_pre_hooks _version _wrapped_call_impl add_module apply bfloat16 buffers call_super_init children
    clear compile cpu cuda double dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule
    half ipu items keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters pop
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule
    share_memory state_dict to to_empty train training type update values xpu zero_grad
"""
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
RESERVED_GROUPS = ("all", "@wide")  # groups that the model makes itself


def name_problem(name: str) -> str:
    """What keeps text from being the name of a field, a table or a group, or an empty string."""
    if len(own_table(name).encode()) > MAX_NAME_BYTES:
        return f"wanted a name of at most {MAX_NAME_BYTES} bytes"
    if is_writable(name):
        return ""
    return "wanted a name without '/', '\\' or control characters, not starting with '.'"


def is_writable(name: str) -> bool:
    """Whether a name can be that of a file, and is seen as it is where it is printed."""
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\") and name.isprintable()


def is_module_name(name: str) -> bool:
    """Whether torch takes a name for a module."""
    return "." not in name and name not in ATTRIBUTES


def own_table(field: str) -> str:
    """The name of the table that a field has for itself: the field's, spelt otherwise where torch takes it for no module."""
    spelt = field.replace(".", "%2E")
    return f"%{spelt}" if spelt in ATTRIBUTES else spelt


def file_stems(tables: Iterable[str]) -> dict[str, str]:
    """A file name without its ending for each table: its own name, with a hash where that is too long or a disk may not tell it from another's."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for name in tables:
        stem = name
        # disks that do not tell apart upper and lower case, or two spellings of one accent, are common
        if len(name.encode()) > MAX_STEM_BYTES or _as_seen(name) in taken:
            stem = f"{name[:SHORT_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        taken.add(_as_seen(stem))
        stems[name] = stem
    return stems


def _as_seen(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
