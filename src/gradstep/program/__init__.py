"""Rules become programs: traced to a graph, cut into sweeps, emitted as LLVM IR, compiled and run."""
