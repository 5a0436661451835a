"""From prompts to token ids: cleaning, the tokenizer, and the training of a small one.

Files are `tokenizer.json` of the `tokenizers` library with the special tokens of UMT5 (Chung et
al., arXiv 2304.09151). The small tokenizer is byte-pair encoding (Sennrich et al., arXiv
1508.07909) with byte fallback (as in SentencePiece): what no piece covers is spelt in bytes, so
every text in every language has an encoding and nothing is unknown.

Axes: b batch, l tokens.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from chameleon_jax import places
from chameleon_jax.errors import UserError, one_line

PAD, END = "<pad>", "</s>"
SPECIAL = (PAD, END, "<unk>")  # ids 0, 1, 2, as in UMT5
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


class TokenizerError(UserError):
    """A tokenizer cannot be read, trained or used as asked. The message is one line."""


class Encoded(NamedTuple):
    """Prompts as token ids, and what of them the ids hold.

    Attributes:
      ids: int32 [b, l].
      mask: bool [b, l], True up to and including the end token.
      kept: of each prompt the text, after cleaning, that its ids cover.
      cut: of each prompt the rest, which did not fit; "" if all of it did.
    """

    ids: np.ndarray
    mask: np.ndarray
    kept: tuple[str, ...]
    cut: tuple[str, ...]


class Tokenizer:
    """Prompts to token ids: cleaning, the pieces of a `tokenizer.json`, the end token, padding.

    Args:
      pieces: a tokenizer of the `tokenizers` library with the tokens `<pad>` and `</s>`.
      length: tokens of a prompt after padding or truncation, end token included.

    Raises:
      TokenizerError: one of the two tokens is not in the vocabulary, or the length is below 1.
    """

    def __init__(self, pieces: tokenizers.Tokenizer, length: int):
        ids = {name: pieces.token_to_id(name) for name in (PAD, END)}
        lacking = [name for name, number in ids.items() if number is None]
        if lacking:
            raise TokenizerError(
                f"the tokenizer has no {' and no '.join(lacking)}; expected the special tokens of"
                " UMT5"
            )
        if length < 1:
            raise TokenizerError(
                f"a text length of {length} leaves no room for the end token; expected at least 1"
            )
        # Both are done here, so that settings saved in the file cannot interfere.
        pieces.no_truncation()
        pieces.no_padding()
        self.pieces, self.length = pieces, length
        self.pad, self.end = ids[PAD], ids[END]

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab} pieces, {self.length} tokens a prompt)"

    @classmethod
    def from_file(cls, path: str | os.PathLike, length: int) -> Tokenizer:
        """Read a `tokenizer.json`; one that is not here is looked for beside the package, too.

        Raises:
          TokenizerError: the file is missing, is not a tokenizer, or lacks the special tokens.
        """
        file = places.find(path)
        if not file.is_file():
            raise TokenizerError(f"{path}: no such file; expected a tokenizer.json")
        try:
            pieces = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read ({error.strerror or error})") from None
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path}: not a tokenizer.json ({one_line(error)})") from error
        return cls(pieces, length)

    @property
    def vocab(self) -> int:
        """Number of pieces, special tokens included: the smallest `TextConfig.vocab` that fits."""
        return self.pieces.get_vocab_size()

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Clean and encode a batch: `ids` and `mask` of `encode`."""
        encoded = self.encode(prompts)
        return encoded.ids, encoded.mask

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Clean and encode a batch, and say what did not fit.

        A prompt that is too long loses its last pieces, never its end token.

        Args:
          prompts: any strings; the empty one becomes the end token alone.

        Raises:
          TypeError: one string instead of a list of them.
        """
        if isinstance(prompts, str):
            raise TypeError("expected a list of prompts, got one string; wrap it in a list")
        texts = [clean_text(prompt) for prompt in prompts]
        ids = np.full((len(texts), self.length), self.pad, np.int32)
        mask = np.zeros(ids.shape, bool)
        kept, cut = [], []
        room = self.length - 1
        encodings = self.pieces.encode_batch(texts, add_special_tokens=False)
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            tokens = [*encoding.ids[:room], self.end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
            end = len(text)
            if len(encoding.ids) > room:
                # Where the first lost piece begins. A character that is spelt in several bytes
                # and loses one of them is lost.
                end = encoding.offsets[room][0]
            kept.append(text[:end].rstrip())
            cut.append(text[end:].lstrip())
        return Encoded(ids, mask, tuple(kept), tuple(cut))


def clean_text(text: str) -> str:
    """Mend a prompt as Wan's training data were mended, before the tokenizer sees it.

    Broken encodings and typographic characters are repaired (ftfy; full-width punctuation and curly
    quotes become ASCII), HTML entities are resolved twice (scraped captions are often escaped
    twice), runs of white space become one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def byte_tokenizer(length: int) -> Tokenizer:
    """A tokenizer whose pieces are the 256 bytes of UTF-8.

    It has 258 ids, needs no training and knows every language.
    """
    names = [PAD, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {name: number for number, name in enumerate(names)}
    pieces = tokenizers.Tokenizer(models.BPE(ids, []))
    pieces.add_special_tokens([PAD, END])
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Tokenizer(pieces, length)


def train_pieces(texts: Iterable[str], vocab: int = 1024) -> tokenizers.Tokenizer:
    """Learn pieces from texts; the result depends on the texts alone, not on their order.

    Args:
      texts: captions, already cleaned.
      vocab: most pieces there may be, 3 special tokens and 256 bytes among them; fewer if the texts
        hold fewer.

    Returns:
      A tokenizer that appends the end token. Ids: special tokens, bytes, characters, then pieces by
      rank.

    Raises:
      TokenizerError: `vocab` leaves no room for pieces, or the texts are empty.
    """
    fixed = [*SPECIAL, *BYTES]
    if vocab <= len(fixed):
        raise TokenizerError(
            f"a vocabulary of {vocab} has no room for pieces; expected at least {len(fixed) + 1}"
        )
    texts = sorted(texts)
    if not any(text.strip() for text in texts):
        raise TokenizerError("there is no text to learn from")
    learner = _frame(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(fixed), min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    names = fixed + sorted(learned["vocab"], key=learned["vocab"].get)
    ids = {name: number for number, name in enumerate(names)}
    merges = [tuple(pair) for pair in learned["merges"]]
    pieces = _frame(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    pieces.add_special_tokens(list(SPECIAL))
    pieces.post_processor = processors.TemplateProcessing(
        f"$A {END}", special_tokens=[(END, ids[END])]
    )
    return pieces


def _frame(model: models.Model) -> tokenizers.Tokenizer:
    """A tokenizer around a model.

    Compatibility forms and case are folded, words begin with ▁, punctuation stands apart.
    """
    pieces = tokenizers.Tokenizer(model)
    pieces.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    pieces.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
    )
    return pieces
