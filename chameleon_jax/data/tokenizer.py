"""Training of a small tokenizer on captions, in the file format and with the special tokens of
UMT5.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) with byte fallback (as in SentencePiece):
what no piece covers is spelt in bytes, so every text in every language has an encoding and nothing
is unknown. The result depends on the texts alone, not on their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in UMT5
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def _frame(model: models.Model) -> Tokenizer:
    """A tokenizer around a model: compatibility forms and case folded, a leading ▁ on words,
    punctuation apart.
    """
    pieces = Tokenizer(model)
    pieces.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    pieces.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
    )
    return pieces


def train_pieces(texts: Iterable[str], vocab: int = 1024) -> Tokenizer:
    """Learn pieces from texts.

    Args:
      texts: captions, already cleaned.
      vocab: most pieces there may be, 3 special tokens and 256 bytes among them; fewer if the texts
        hold fewer.

    Returns:
      A tokenizer that appends the end token. Ids: special tokens, bytes, characters, then pieces by
      rank.

    Raises:
      ValueError: if `vocab` leaves no room for pieces, or the texts are empty.
    """
    room = vocab - len(SPECIAL) - len(BYTES)
    texts = sorted(texts)
    if room < 1:
        raise ValueError(
            f"a vocabulary of {vocab} has no room for pieces; expected at least"
            f" {len(SPECIAL) + len(BYTES) + 1}"
        )
    if not any(text.strip() for text in texts):
        raise ValueError("there is no text to learn from")
    learner = _frame(models.BPE())
    learner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=room, min_frequency=2, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    names = [*SPECIAL, *BYTES, *pieces]
    merges = [tuple(pair) for pair in learned["merges"]]
    numbers = {name: number for number, name in enumerate(names)}
    tokenizer = _frame(
        models.BPE(vocab=numbers, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer
