"""The processor that kernels are compiled for."""

import functools


@functools.cache
def triple() -> str:
    """The target as LLVM names it: architecture, vendor, system."""
    import llvmlite.binding as llvm

    return llvm.get_process_triple()


@functools.cache
def cpu() -> tuple[str, str]:
    """The model, and its features as a list of +name and -name."""
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def architecture() -> str:
    """The first part of the target: x86_64, aarch64 and so on."""
    return triple().partition("-")[0]


def converts_float16() -> bool:
    """Whether there are instructions between float16 and float32; else LLVM calls functions that are not there."""
    return architecture() in ("aarch64", "arm64") or "+f16c" in cpu()[1].split(",")
