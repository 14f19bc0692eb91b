"""The large libraries, loaded by one thread before two need them.

transformers and diffusers put something else in their place in `sys.modules` while they load, and their parts import
each other in circles. When a run and a question of the editor load them at the same time, Python breaks the tie by
handing out a half-made module: "cannot import name 'PreTrainedModel' from 'transformers'", and the run fails (seen with
transformers 5.23 and diffusers 0.42). Once both are there in full, more threads do no harm.
"""

from __future__ import annotations

import gc
import importlib
import logging
import threading

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded = threading.Event()

NEEDED = {
    "transformers": ("PreTrainedModel", "CLIPTextModel", "T5EncoderModel"),
    "diffusers": ("FluxTransformer2DModel", "AutoencoderTiny"),
}
"""What the loaders of the embedded host, and the libraries of formats, take from them."""


def load() -> None:
    """Load them, or wait for the thread that does. What is missing is said by the node that needs it."""
    if _loaded.is_set():
        return
    with _lock:
        if _loaded.is_set():
            return
        for name, parts in NEEDED.items():
            try:
                module = importlib.import_module(name)
                for part in parts:
                    getattr(module, part)
            except (ImportError, RuntimeError, AttributeError) as err:  # RuntimeError: diffusers' word for ImportError
                _log.info("%s cannot be loaded: %s", name, err)
        # They stay for good: without this, Python looks through 500,000 objects of theirs when it exits, for seconds.
        gc.freeze()
        _loaded.set()
