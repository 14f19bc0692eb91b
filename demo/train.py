"""Train the demo's text-to-image model on handwritten digits and write it in ComfyUI's file layouts.

    python demo/train.py [--out demo/models] [--steps 3000] [--stages decoder,base,distill,export,evaluate]

Four small parts, the same in kind as in FLUX.1-dev with its TAESD decoder:

- Latent. A fixed map takes the encoder's place: z = (pixel - mean) / std of the 8x8 digit, repeated over 16 channels,
  so x0 has the shape (16, 8, 8). In the file convention of FLUX the raw latent is x / 0.3611 + 0.1159.
- Decoder. TAESD with 16 latent channels, trained to give the digit at 64x64, with small noise on its input so that it
  removes what the sampler leaves.
- Base. Rectified flow: x_t = (1 - t) x0 + t noise, the target is v = noise - x0, t is logit-normal and then shifted by
  t' = s t / (1 + (s - 1) t), s = e^1.15, as ComfyUI samples FLUX. A CLIP text model is trained along. The guidance
  input is 1, and a tenth of the prompts is empty.
- Distillation. As in "On Distillation of Guided Diffusion Models" (Meng et al. 2023), the student sees the guidance
  w ~ U(1, 5) and learns v_uncond + w (v_cond - v_uncond) of the frozen base, so that sampling needs one forward per
  step. The text encoder is frozen by then.

Each stage leaves its result in --work as safetensors with float32 weights, so a later stage can run again alone.
Exported weights are bfloat16 and an exponential moving average. Seeds are fixed; different CPUs and torch versions
still round differently, so a second run gives an equally good model and not the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from digits import TEMPLATES, WORDS, demo_pairs, load_split, read_digits, train_classifier, upsample
from digits_model import (
    BOS,
    EOS,
    FILES,
    LONG,
    PAD_TO,
    VAE_SCALE,
    VAE_SHIFT,
    decode,
    encode,
    flux_to_comfy,
    load,
    load_models,
    make_clip,
    make_decoder,
    make_flux,
    pack,
    sample,
    save,
    shifted,
    sub,
    velocity,
)
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import CLIPTextModel

CLIP_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim",
    "initializer_factor", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def make_tokenizer(model: models.BPE) -> Tokenizer:
    """Put CLIP's normalizer and pre-tokenizer around a BPE model."""
    tok = Tokenizer(model)
    tok.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    return tok


def train_tokenizer() -> Tokenizer:
    """Train CLIP's kind of byte-level BPE on the prompts.

    Every printable ASCII character and every UTF-8 byte above it gets a token, alone and as a word's end, so that any
    text can be encoded and nothing becomes an unknown token in mid-prompt.
    """
    # The trainer numbers word-end characters in a hash map's order; naming them first makes the ids the same each run.
    byte_level = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [c for c in byte_level if not (c.isascii() and c.isupper())]
    finals = (
        "".join(map(chr, range(33, 127))).lower()
        + pre_tokenizers.ByteLevel().pre_tokenize_str("".join(chr(0x2500 + i) for i in range(64)))[-1][0]
    )
    ends = [f"{c}</w>" for c in alphabet if c in finals]
    plain = ["a picture of the cat and a dog in the style of an old photograph, high quality, please write it by hand"]
    lines = [t.format(n) for t in TEMPLATES for d, w in enumerate(WORDS) for n in (w, str(d))]
    trainer = trainers.BpeTrainer(
        vocab_size=512, min_frequency=5, special_tokens=[BOS, EOS, *ends], end_of_word_suffix="</w>",
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    drawn = make_tokenizer(models.BPE(unk_token=EOS, end_of_word_suffix="</w>"))
    drawn.train_from_iterator(lines * 5 + plain * 5, trainer)
    # Built anew, because the trainer has made `ends` special tokens, which would match inside a prompt.
    bpe = json.loads(drawn.to_str())["model"]
    merges = [tuple(m) for m in bpe["merges"]]
    tok = make_tokenizer(models.BPE(bpe["vocab"], merges, unk_token=EOS, end_of_word_suffix="</w>"))
    tok.add_special_tokens([BOS, EOS])
    bos, eos = tok.token_to_id(BOS), tok.token_to_id(EOS)
    tok.post_processor = processors.RobertaProcessing(
        (EOS, eos), (BOS, bos), trim_offsets=False, add_prefix_space=False
    )
    return tok


def training_prompts() -> tuple[list[str], Tensor]:
    """List all prompts, and (10, n) indices of each digit's prompts; the last prompt is the empty one."""
    per_digit = [[t.format(n) for t in TEMPLATES for n in (WORDS[d], str(d))] for d in range(10)]
    n = len(per_digit[0])
    return [p for ps in per_digit for p in ps] + [""], torch.arange(10 * n).reshape(10, n)


def noise_of(pairs: list[tuple[str, int, int]]) -> Tensor:
    return torch.cat([torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(s)) for _, s, _ in pairs])


class Trainer:
    """AdamW, clipped gradients, warm-up and cosine, and an exponential moving average in `self.ema`."""

    def __init__(self, modules: list[torch.nn.Module], lr: float, steps: int, decay: float = 0.999) -> None:
        self.live = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.ema = [copy.deepcopy(m).eval().requires_grad_(False) for m in modules]
        self.average = [p for m in self.ema for p in m.parameters()]
        self.opt = torch.optim.AdamW(self.live, lr=lr, weight_decay=0.01, fused=True)
        warm = min(200, steps // 10 + 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.opt, lambda s: min((s + 1) / warm, 0.01 + 0.99 * (1 + math.cos(math.pi * min(s / steps, 1))) / 2)
        )
        self.steps, self.decay = steps, decay

    def run(self, name: str, loss_of: Callable[[], Tensor], every: int, report: Callable[[], str]) -> None:
        start, total = time.time(), 0.0
        for step in range(1, self.steps + 1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of()
            self.opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.live, 1.0)
            self.opt.step()
            self.schedule.step()
            torch._foreach_lerp_(self.average, self.live, 1 - min(self.decay, (1 + step) / (10 + step)))
            total += loss.item()
            if step % every == 0 or step == self.steps:
                mean = total / ((step - 1) % every + 1)
                print(f"{name} {step}/{self.steps} loss {mean:.4f} {time.time() - start:.0f}s {report()}", flush=True)
                total = 0.0


class Data:
    """Training digits as latents, prompts as tokens, and the fixed pairs to measure on."""

    def __init__(self) -> None:
        x, y, _, _ = load_split()
        self.pixels, self.labels = torch.from_numpy(x), torch.from_numpy(y)
        self.mean, self.std = self.pixels.mean().item(), self.pixels.std().item()
        self.clf, self.held_out = train_classifier()
        self.pairs = demo_pairs()
        self.noise = noise_of(self.pairs)
        self.prompts, self.of_digit = training_prompts()

    def latent(self, pixels: Tensor) -> Tensor:
        return ((pixels - self.mean) / self.std)[:, None].expand(-1, 16, -1, -1)

    def accuracy(self, latent: Tensor) -> float:
        """Read digits straight from the latents, without the decoder: quicker, for use while training."""
        images = upsample((latent.mean(1) * self.std + self.mean).clamp(0, 1)).numpy()
        return float((read_digits(images, self.clf) == np.array([d for _, _, d in self.pairs])).mean())

    def batch(self, size: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Draw packed x0 and noise (B, 16, 64), t (B,), prompt indices (B,), and the prompt length."""
        length = PAD_TO if torch.rand(()) < 0.85 else LONG
        size = size if length == PAD_TO else size // 2  # a long prompt makes a step three times as slow
        i = torch.randint(len(self.labels), (size,))
        x0 = pack(self.latent(self.pixels[i]))
        choice = self.of_digit[self.labels[i], torch.randint(self.of_digit.shape[1], (size,))]
        choice = torch.where(torch.rand(size) < 0.1, len(self.prompts) - 1, choice)
        t = shifted(torch.sigmoid(torch.randn(size)))
        return x0, torch.randn_like(x0), t, choice, length


def train_decoder(data: Data, work: Path, steps: int) -> None:
    torch.manual_seed(1)
    decoder = make_decoder().to(memory_format=torch.channels_last)
    for name, p in decoder.named_parameters():
        if name.endswith("conv.4.weight"):  # start each block near the identity: it converges in hundreds of steps
            p.data.mul_(0.1)
    trainer = Trainer([decoder], 1e-3, steps, decay=0.99)

    def loss() -> Tensor:
        i, j = torch.randint(len(data.pixels), (2, 16))
        blend = torch.rand(16, 1, 1).sub(0.5).clamp(0) * 2  # half of the batch are plain digits
        pixels = data.pixels[i] * (1 - blend) + data.pixels[j] * blend
        x = data.latent(pixels) + torch.randn(16, 16, 8, 8) * torch.rand(16, 1, 1, 1) * 0.2
        target = upsample(pixels)[:, None] * 2 - 1
        return (decoder(x).float() - target).square().mean()

    trainer.run("decoder", loss, 100, lambda: "")
    save(work / "decoder.safetensors", trainer.ema[0].state_dict())


def train_base(data: Data, work: Path, steps: int) -> None:
    (work / "student.safetensors").unlink(missing_ok=True)  # it would belong to another base
    torch.manual_seed(2)
    tokenizer = train_tokenizer()
    flux, clip = make_flux(), make_clip(tokenizer)
    ids = {n: encode(tokenizer, data.prompts, n) for n in (PAD_TO, LONG)}
    shown = encode(tokenizer, [p for p, _, _ in data.pairs], PAD_TO)
    trainer = Trainer([flux, clip], 8e-4, steps)
    ema_flux, ema_clip = trainer.ema

    def loss() -> Tensor:
        x0, noise, t, choice, length = data.batch()
        used, back = choice.unique(return_inverse=True)
        text = clip(ids[length][used])
        xt = x0 + t[:, None, None] * (noise - x0)
        v = velocity(flux, xt, t, torch.ones_like(t), text.last_hidden_state[back], text.pooler_output[back])
        return (v.float() - (noise - x0)).square().mean()

    def report() -> str:
        both = {f"flux.{k}": v for k, v in ema_flux.state_dict().items()}
        both |= {f"clip.{k}": v for k, v in ema_clip.state_dict().items()}
        save(work / "base.safetensors", both, {"tokenizer_json": tokenizer.to_str()})
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            text = ema_clip(shown)
            x = sample(ema_flux, text.last_hidden_state, text.pooler_output, data.noise, 12, 1.0)
        return f"accuracy, guidance 1, 12 steps: {data.accuracy(x):.3f}"

    trainer.run("base", loss, 500, report)


def load_base(work: Path) -> tuple[FluxTransformer2DModel, CLIPTextModel, Tokenizer]:
    sd, metadata = load(work / "base.safetensors")
    tokenizer = Tokenizer.from_str(metadata["tokenizer_json"])
    flux, clip = make_flux(), make_clip(tokenizer)
    flux.load_state_dict(sub(sd, "flux."))
    clip.load_state_dict(sub(sd, "clip."))
    return flux.eval(), clip.eval().requires_grad_(False), tokenizer


def distill(data: Data, work: Path, steps: int) -> None:
    torch.manual_seed(3)
    student, clip, tokenizer = load_base(work)
    teacher = copy.deepcopy(student).requires_grad_(False)
    clip = clip.to(torch.bfloat16).float()  # the encoder as it will be read from its file
    with torch.no_grad():
        texts = {n: clip(encode(tokenizer, data.prompts, n)) for n in (PAD_TO, LONG)}
        shown = clip(encode(tokenizer, [p for p, _, _ in data.pairs], PAD_TO))
    trainer = Trainer([student], 3e-4, steps)

    def loss() -> Tensor:
        x0, noise, t, choice, length = data.batch()
        context, pooled = texts[length].last_hidden_state, texts[length].pooler_output
        xt = x0 + t[:, None, None] * (noise - x0)
        w = 1 + 4 * torch.rand(len(t))
        with torch.no_grad():
            both = torch.cat([choice, torch.full_like(choice, len(data.prompts) - 1)])
            one = torch.ones(2 * len(t))
            v = velocity(teacher, xt.repeat(2, 1, 1), t.repeat(2), one, context[both], pooled[both]).float()
            v_cond, v_uncond = v.chunk(2)
            target = v_uncond + w[:, None, None] * (v_cond - v_uncond)
        v = velocity(student, xt, t, w, context[choice], pooled[choice])
        return (v.float() - target).square().mean()

    def report() -> str:
        save(work / "student.safetensors", trainer.ema[0].state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            x = sample(trainer.ema[0], shown.last_hidden_state, shown.pooler_output, data.noise, 8, 3.5)
        return f"accuracy, guidance 3.5, 8 steps: {data.accuracy(x):.3f}"

    trainer.run("distill", loss, 250, report)


def export(work: Path, out: Path) -> None:
    """Write the three files; without a distilled student, the base model stands in for it."""
    flux, clip, tokenizer = load_base(work)
    if (work / "student.safetensors").exists():
        flux.load_state_dict(load(work / "student.safetensors")[0])
    half = {k: v.to(torch.bfloat16) for k, v in flux_to_comfy(flux.state_dict()).items()}
    save(out / FILES["flux"], half)
    config = {k: getattr(clip.config, k) for k in CLIP_FIELDS}
    metadata = {"config": json.dumps(config), "tokenizer_json": tokenizer.to_str(), "pad_to": str(PAD_TO)}
    text = {f"text_model.{k.removeprefix('text_model.')}": v.to(torch.bfloat16) for k, v in clip.state_dict().items()}
    save(out / FILES["clip"], text, metadata)
    decoder = sub(load(work / "decoder.safetensors")[0], "layers.")
    renamed: dict[str, Tensor] = {}
    for k, v in decoder.items():
        n, rest = k.split(".", 1)
        renamed[f"taesd_decoder.{int(n) + 1}.{rest}"] = v.to(torch.bfloat16)  # ComfyUI counts the clamp as layer 0
    renamed |= {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(VAE_SHIFT)}
    save(out / FILES["tae"], renamed)


def round_weights(
    flux: FluxTransformer2DModel, bits: int, group_size: int | None
) -> tuple[FluxTransformer2DModel, float]:
    """Copy the model with the blocks' 2-D weights rounded to nearest, symmetric; also the relative weight error."""
    flux, lost, whole = copy.deepcopy(flux), 0.0, 0.0
    top = 2 ** (bits - 1) - 1
    for name, p in flux.named_parameters():
        if p.ndim == 2 and "transformer_blocks." in name:
            w = p.data.reshape(-1, group_size or p.shape[1])
            scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / top
            q = ((w / scale).round().clamp(-top - 1, top) * scale).reshape(p.shape)
            lost, whole = lost + (q - p.data).square().sum().item(), whole + p.data.square().sum().item()
            p.data.copy_(q)
    return flux, math.sqrt(lost / whole)


def evaluate(data: Data, out: Path, sheet: Path) -> None:
    """Print digit accuracy over the fixed pairs, whole path from the files, and draw a contact sheet."""
    flux, clip, tokenizer, decoder = load_models(out)
    digits = np.array([d for _, _, d in data.pairs])
    print(f"classifier, held-out accuracy {data.held_out:.4f}")

    def measure(
        model: FluxTransformer2DModel, length: int, steps: int, guidance: float = 3.5, phrase: str = ""
    ) -> tuple[float, np.ndarray]:
        prompts = [phrase.format(WORDS[d]) if phrase else p for p, _, d in data.pairs]
        with torch.no_grad():
            text = clip(encode(tokenizer, prompts, length))
        x = sample(model, text.last_hidden_state, text.pooler_output, data.noise, steps, guidance)
        images = decode(decoder, x)
        return float((read_digits(images, data.clf) == digits).mean()), images

    half = copy.deepcopy(flux).to(torch.bfloat16)
    for length in (PAD_TO, LONG):
        row = {n: measure(half, length, n)[0] for n in (4, 6, 8, 12, 20)}
        print(f"bf16, L={length}, guidance 3.5: " + ", ".join(f"{n} steps {a:.3f}" for n, a in row.items()), flush=True)
    start = time.time()
    _, images = measure(half, PAD_TO, 8)
    print(f"bf16, L=16, 8 steps, 200 images and decoding: {time.time() - start:.1f}s")
    print(f"fp32, L=16, 8 steps: {measure(flux, PAD_TO, 8)[0]:.3f}")
    for guidance in (1.0, 2.0, 5.0):
        print(f"bf16, L=16, 8 steps, guidance {guidance}: {measure(half, PAD_TO, 8, guidance)[0]:.3f}", flush=True)
    for phrase in ("a handwriten {}", "please write a big {} with chalk"):
        print(f"phrasing not trained on, {phrase!r}: {measure(half, PAD_TO, 8, phrase=phrase)[0]:.3f}", flush=True)
    for bits, group_size in ((8, None), (4, 64), (4, None), (3, 64), (2, 64), (2, None)):
        rounded, error = round_weights(flux, bits, group_size)
        rounded = rounded.to(torch.bfloat16)
        score, other = measure(rounded, PAD_TO, 8)
        psnr = -10 * math.log10(float(np.square(other - images).mean()))
        print(
            f"{bits} bit, group {group_size or 'row'}: weight error {error:.3f}, accuracy {score:.3f}, "
            f"PSNR to bf16 {psnr:.1f} dB, accuracy at guidance 1 {measure(rounded, PAD_TO, 8, 1.0)[0]:.3f}",
            flush=True,
        )
    grid = images[:100].reshape(10, 10, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(640, 640, 3)
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(sheet)
    for name in FILES.values():
        print(f"{name}: {(out / name).stat().st_size} bytes")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train the handwritten-digits demo model.")
    parser.add_argument("--out", type=Path, default=here / "models", help="folder with ComfyUI's model sub-folders")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "digits_flux", help="checkpoints")
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=3000, help="base training")
    parser.add_argument("--distill-steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", default="decoder,base,distill,export,evaluate", help="comma-separated, in order")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    data = Data()
    stages: dict[str, Callable[[], None]] = {
        "decoder": lambda: train_decoder(data, args.work, args.decoder_steps),
        "base": lambda: train_base(data, args.work, args.steps),
        "distill": lambda: distill(data, args.work, args.distill_steps),
        "export": lambda: export(args.work, args.out),
        "evaluate": lambda: evaluate(data, args.out, args.work / "sheet.png"),
    }
    for name in args.stages.split(","):
        if name not in stages:
            parser.error(f"unknown stage {name!r}; choose from {', '.join(stages)}")
        stages[name]()


if __name__ == "__main__":
    main()
