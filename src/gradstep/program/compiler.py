"""From IR to a function in memory, through LLVM and a cache on disk."""

import contextlib
import ctypes
import functools
import os
import stat
import threading
import warnings
from typing import TYPE_CHECKING, Any

from gradstep.program.processor import architecture, cpu, triple

if TYPE_CHECKING:
    from pathlib import Path

    from gradstep.program.frame import KernelSource

# Kernels run with denormals kept and rounding to nearest, whatever mode the calling thread is in.
X86_MODE = """
declare void @llvm.x86.sse.stmxcsr(ptr)
declare void @llvm.x86.sse.ldmxcsr(ptr)
define internal i64 @ieee_mode() alwaysinline {
  %old = alloca i32
  %new = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %old)
  store i32 8064, ptr %new
  call void @llvm.x86.sse.ldmxcsr(ptr %new)
  %value = load i32, ptr %old
  %wide = zext i32 %value to i64
  ret i64 %wide
}
define internal void @restore_mode(i64 %mode) alwaysinline {
  %old = alloca i32
  %value = trunc i64 %mode to i32
  store i32 %value, ptr %old
  call void @llvm.x86.sse.ldmxcsr(ptr %old)
  ret void
}
"""
ARM_MODE = """
declare i64 @llvm.aarch64.get.fpcr()
declare void @llvm.aarch64.set.fpcr(i64)
define internal i64 @ieee_mode() alwaysinline {
  %old = call i64 @llvm.aarch64.get.fpcr()
  call void @llvm.aarch64.set.fpcr(i64 0)
  ret i64 %old
}
define internal void @restore_mode(i64 %mode) alwaysinline {
  call void @llvm.aarch64.set.fpcr(i64 %mode)
  ret void
}
"""
OTHER_MODE = """
define internal i64 @ieee_mode() alwaysinline {
  ret i64 0
}
define internal void @restore_mode(i64 %mode) alwaysinline {
  ret void
}
"""
MAGIC = b"gradstep kernel 1\n"

_lock = threading.RLock()
# A fork waits until no other thread is inside LLVM, so that the child finds it in order.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Kernel:
    """A compiled sweep: call it with the address of a job. The call runs without the GIL."""

    def __init__(self, source: "KernelSource") -> None:
        self.source = source
        self.address = load_function("sweep", module_ir(source.ir))
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


@functools.cache
def compile_kernel(source: "KernelSource") -> Kernel:
    """The kernel of `source`."""
    return Kernel(source)


_engines: dict[str, Any] = {}  # own the machine code, for as long as the process lives


def load_function(name: str, module: str) -> int:
    """The address of a function of the module: from memory, else from disk, else compiled."""
    with _lock:
        if module not in _engines:
            _engines[module] = _load(module)
        return _engines[module].get_function_address(name)


def _load(module: str) -> Any:
    llvm, target = _target()
    key = _key(module)
    code = _read(key)
    if code is None:
        code = _compile(module)
        _write(key, code)
    engine: Any = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def arithmetic_ir() -> str:
    """The functions that switch to IEEE arithmetic and back, for everybody."""
    return module_ir(
        "define i64 @enter_ieee() {\n  %mode = call i64 @ieee_mode()\n  ret i64 %mode\n}\n"
        "define void @leave_ieee(i64 %mode) {\n  call void @restore_mode(i64 %mode)\n  ret void\n}\n"
    )


def module_ir(ir: str) -> str:
    """The module of `ir` for this machine, with the switches of the arithmetic mode."""
    machine = architecture()
    mode = X86_MODE if machine == "x86_64" else ARM_MODE if machine in ("aarch64", "arm64") else OTHER_MODE
    return f"{mode}\n{ir}"


def _compile(ir: str) -> bytes:
    llvm, make_target = _target()
    target = make_target()
    module = llvm.parse_assembly(f'target triple = "{triple()}"\n{ir}')
    module.verify()
    # The IR is already in vectors; what is left to LLVM is scheduling, registers and loop invariants.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(target, options)
    builder.getModulePassManager().run(module, builder)
    return target.emit_object(module)


@functools.cache
def _target() -> tuple[Any, Any]:
    import llvmlite.binding

    llvm: Any = llvmlite.binding
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()

    def make() -> Any:
        target: Any = llvm.Target.from_triple(triple())
        return target.create_target_machine(cpu=cpu()[0], features=cpu()[1], opt=2)

    return llvm, make


def _key(module: str) -> str:
    llvm, _ = _target()
    parts = (module, repr(llvm.llvm_version_info), triple(), *cpu())
    return _sha256("\0".join(parts).encode()).hex()


def _sha256(content: bytes) -> bytes:
    import hashlib  # late: it loads OpenSSL

    return hashlib.sha256(content).digest()


def cache_folder() -> "Path":
    """Where kernels are kept: `GRADSTEP_CACHE_DIR`, or the user's cache folder."""
    from pathlib import Path

    chosen = os.environ.get("GRADSTEP_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("gradstep", appauthor=False))


def _read(key: str) -> bytes | None:
    """The object code kept under `key`, when it is whole and nobody else could have written it."""
    folder = cache_folder()
    try:
        if not _is_private(os.stat(folder)):
            _warn_once(folder)
            return None
        with open(folder / f"{key}.o", "rb") as file:
            if not _is_private(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None
    head, digest, code = content[: len(MAGIC)], content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
    whole = head == MAGIC and _sha256(key.encode() + code) == digest
    return code if whole else None


def _write(key: str, code: bytes) -> None:
    """Keep the object code; a folder that cannot be written, or that others can, is left alone."""
    import tempfile

    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(os.stat(folder)):
            return
        handle, name = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + _sha256(key.encode() + code) + code)
            os.replace(name, folder / f"{key}.o")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _is_private(status: os.stat_result) -> bool:
    """Whether only this user can write there. Where files have no such owners, the folder is trusted."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _warn_once(folder: "Path") -> None:
    warnings.warn(
        f"other users can write to {folder}, so kernels are not kept there and are compiled in every process; "
        "make the folder private (chmod 700) or set GRADSTEP_CACHE_DIR",
        RuntimeWarning,
        stacklevel=2,
    )
