r"""Pre-tokenizers: how a byte-level vocabulary wants text split before its merges apply.

``tokenizer.ggml.pre`` names one. The names are those of llama.cpp (``src/llama-vocab.cpp``, and
``convert_hf_to_gguf_update.py``, which detects them), and so are the two flags. The patterns are those of the
``tokenizer.json`` that a model was published with, where llama.cpp quotes it: its own engine has neither
``(?i:)`` nor classes such as ``\p{Lu}``, so that its patterns of ``tekken`` and ``gpt-4o`` approximate them.

Every pattern cuts the pieces that the one before it left: its matches become pieces, and so does what lies
between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from refengine.errors import UnsupportedError


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split.

    Attributes:
        patterns: regular expressions in Oniguruma's syntax, applied one after the other.
        ignore_merges: a piece that is a token as a whole becomes it, even where no merges lead there.
        add_bos: whether text begins with the BOS token where the file does not say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of this name.

    Raises:
        UnsupportedError: the name is unknown; the text lists the known ones.
    """
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) is not implemented; "
            f"implemented are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


# GPT-2's encoder.py; `ByteLevel` of Hugging Face's tokenizers.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# tiktoken's cl100k_base, as Llama 3 and its descendants publish it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2's tokenizer.json: Llama 3's pattern with digits one by one; Qwen3 uses it unchanged.
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# Qwen3.5's tokenizer.json: combining marks belong to the letters before them.
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Seed-Coder's tokenizer.json.
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ling's (BailingMoE's) tokenizer.json.
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Words that change case once: capitals, then small letters. Of tiktoken's o200k_base.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

# Tekken, Mistral NeMo's tokenizer.json.
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken's o200k_base: GPT-4o, gpt-oss, Llama 4.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# BLOOM's tokenizer.json.
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

# DeepSeek LLM's tokenizer.json, which spells out the letters that have a case; then DeepSeek Coder's.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\u0386\u0388-\u038aΌ\u038e-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
    "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184Ⰰ-ⱻ\u2c7e-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿ\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")

# DeepSeek-V3's tokenizer.json; DeepSeek-R1 and Hunyuan use it unchanged.
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# Falcon's tokenizer.json: runs of punctuation, GPT-2, digits in threes.
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")

# llama.cpp's own, for vocabularies without a better one.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# StarCoder's tokenizer.json: every digit alone, then GPT-2.
DIGITS = (r"\p{N}", GPT2)


def _table() -> dict[str, PreTokenizer]:
    groups = (
        (PreTokenizer(DEFAULT), "default"),
        (
            PreTokenizer((GPT2,)),
            "gpt-2 phi-2 mpt olmo jais trillion gigachat exaone4 mellum a.x-4.0 granite-docling",
        ),
        (PreTokenizer(DIGITS), "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2"),
        (PreTokenizer(FALCON), "falcon"),
        (
            PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        ),
        (PreTokenizer((LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
        (
            PreTokenizer((QWEN2,)),
            "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2",
        ),
        (PreTokenizer((QWEN35,)), "qwen35"),
        (PreTokenizer((SEED_CODER,)), "seed-coder"),
        (PreTokenizer((BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
        (PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
        (PreTokenizer((GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
        (PreTokenizer((BLOOM,)), "bloom poro-chat gpt3-finnish"),
        (PreTokenizer((BLOOM, r"\p{N}")), "viking"),
        (PreTokenizer(DEEPSEEK_LLM), "deepseek-llm"),
        (PreTokenizer(DEEPSEEK_CODER), "deepseek-coder"),
        (PreTokenizer(DEEPSEEK_V3), "deepseek-v3 hunyuan-dense joyai-llm"),
    )
    return {name: group for group, names in groups for name in names.split()}


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(_table())
"""Every pre-tokenizer, by its name in a file."""
