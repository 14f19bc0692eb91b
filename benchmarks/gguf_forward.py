"""What does a forward pass on GGUF weights cost? Seconds over those of bfloat16, ours and diffusers' own GGUF layers.

    python benchmarks/gguf_forward.py [--formats gguf-q8-0 ...] [--tokens 1024] [--repeats 5] [--no-peers] [--json FILE]

`benchmarks/forward.py` with the GGUF formats: a FLUX layout of 332 M parameters, every linear layer quantized, each
repeat running bfloat16, ours and diffusers one after the other. Target: at most 1.5 for Q8_0, Q4_K and Q6_K.
"""

from __future__ import annotations

import sys

from forward import main

DEFAULTS = ["gguf-q8-0", "gguf-q4-0", "gguf-q4-k", "gguf-q5-k", "gguf-q6-k"]

if __name__ == "__main__":
    if "--formats" not in sys.argv:
        sys.argv += ["--formats", *DEFAULTS]
    sys.exit(main())
