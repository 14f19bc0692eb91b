"""Probes: what the installed libraries do to each carrier and format when accelerate or diffusers offloads it.

A probe builds a small module of a library's real layers, carries a mode out with the real calls, and compares two
forward passes bit by bit with the same module that nothing offloads. It runs in a process of its own, so that a library
that takes its process down is one bad cell and not the end of the run.

    net       the module that is quantized, its inputs, the device that computes
    optional  libraries that may not be there
    build     the real layers of every carrier and format
    place     the real calls of every mode and variant, and the proof that the mode is in force
    held      what layers hold in memory, and that they give it back
    moving    what would fail between two devices, on machines that have one
    cell      one cell: build, place, run, compare
    worker    a process that runs cells one after another
    runner    processes side by side, and what became of those that died
    record    measured.json, and where it and the table disagree
"""
