"""Text encoders of a few megabytes: the host's own classes and detection, at the sizes of small.json.

The host makes each encoder at the one size that is published, gigabytes for most. Only sizes change here.
"""

from __future__ import annotations

import json
from pathlib import Path

SIZES = json.loads((Path(__file__).parent / "small.json").read_text())


def shrink():
    import comfy.sd1_clip
    import comfy.text_encoders.llama as llama

    for name, sizes in SIZES["configs"].items():
        setattr(llama, name, _with_defaults(getattr(llama, name), sizes))
    llama.qwen_vl.Qwen2VLVisionTransformer = _overriding(llama.qwen_vl.Qwen2VLVisionTransformer, SIZES["vision"])
    original = comfy.sd1_clip.SDClipModel.__init__

    def init(self, *args, textmodel_json_config=None, **kwargs):
        if isinstance(textmodel_json_config, str) and Path(textmodel_json_config).name in SIZES["files"]:
            config = json.loads(Path(textmodel_json_config).read_text())
            textmodel_json_config = config | SIZES["files"][Path(textmodel_json_config).name]
        original(self, *args, textmodel_json_config=textmodel_json_config, **kwargs)

    comfy.sd1_clip.SDClipModel.__init__ = init
    bring_llama_tokenizer()


def bring_llama_tokenizer():
    """Trees without Llama 3's tokenizer (17 MB) get one of single bytes, so that the encoder can be tried."""
    import base64

    from comfy.text_encoders import bpe_tokenizer, hunyuan_video

    folder = Path(hunyuan_video.__file__).parent / "llama_tokenizer"
    if (folder / "tokenizer.json").exists():
        return
    pieces = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    config = {"default_vocab_size": 257, "default_num_special_tokens": 1}
    special = [{"rank": 0, "token_str": "<|end_of_text|>"}]
    data = json.dumps({"config": config, "vocab": pieces, "special_tokens": special})
    cls = bpe_tokenizer.LlamaTokenizerFast
    cls.from_pretrained = staticmethod(lambda path, **_: bpe_tokenizer.from_tekken_json(data))


def _with_defaults(cls, sizes):
    return lambda **given: cls(**(sizes | given))


def _overriding(cls, sizes):
    return lambda **given: cls(**(given | sizes))
