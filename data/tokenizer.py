"""A checkpoint's tokenizer.json, without the library defaults that silently change token ids.

The begin-of-sequence ids are those that the checkpoint's own post-processor puts before a text
(Llama-2 `<s>`, Llama-3 `<|begin_of_text|>`). They are found once and then prepended here, so that
no library version can drop or double them; anything appended after a text (EOS) is left out.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from runtime.errors import UserError, check_text

INSTRUCTED = "{instruction}:{text}\n"  # the one template with instructions (paper, official code)
CHUNK = 512  # texts tokenised per call: bounds the memory of the library's Encoding objects


def choose_template(
    template: str, document_template: str, instruction: str = "", document: bool = False
) -> str:
    """The template in which texts with (or without) an instruction, or documents, are read.

    UserError if the template has no place for the instruction.
    """
    if document and document_template:
        return document_template
    check_text(instruction, "instruction")
    if not instruction:
        return "{text}" if "{instruction}" in template else template
    if template == "{text}":
        template = INSTRUCTED
    if "{instruction}" not in template:
        raise UserError(f"instruction {instruction!r}: the template {template[:60]!r} has no place "
                        f"for one; leave the instruction out")
    return template.replace("{instruction}", instruction)


def check_special_tokens(tokenizer: "Tokenizer", templates: tuple[str, ...]):
    """UserError if a template has a special token like </s> that the tokenizer does not know."""
    for template in templates:
        for token in re.findall(r"<[^<>\s]+>", template):
            if tokenizer.backend.token_to_id(token) is None:
                raise UserError(f"template {template!r}: {token} is no token of {tokenizer.file}; "
                                f"write its own end-of-text token")


class Tokens(NamedTuple):
    """Texts as a model reads them, one entry each."""

    ids: list[np.ndarray]  # int32, BOS first
    tails: list[int]  # tokens from the last occurrence of the text in its template on
    cut: list[bool]  # whether the text was longer than the limit


class Tokenizer:
    """Texts -> int32 arrays of token ids that begin with BOS."""

    def __init__(self, folder: Path, vocab_size: int, bos_token_id: int | None = None, bos=-1):
        """Read folder/tokenizer.json; `vocab_size` rows exist in the model's table.

        bos: the id to be put before each text in place of the checkpoint's own, if not negative.
        Raises UserError if the file is missing or damaged, if it has ids the model lacks, or if
        neither its post-processor nor `bos_token_id` (config.json) says what BOS is.
        """
        self.file = Path(folder) / "tokenizer.json"
        if not self.file.is_file():
            raise UserError(f"{self.file}: missing; save the fast tokenizer beside the weights")
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{self.file}: not a tokenizer.json ({error}); fetch it again")
        self.backend.no_truncation()
        self.backend.no_padding()
        largest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise UserError(f"{self.file}: token id {largest} is beyond the model's vocabulary of "
                            f"{vocab_size}; is it another model's tokenizer?")
        try:
            self.bos = [bos] if bos >= 0 else self._find_bos(bos_token_id)
        except BaseException as error:  # the library raises plain Exception, and panics
            if isinstance(error, UserError) or not (
                isinstance(error, Exception) or type(error).__name__ == "PanicException"
            ):
                raise
            raise UserError(f"{self.file}: cannot tokenize ({error}); fetch it again")
        if any(not 0 <= i < vocab_size for i in self.bos):
            raise UserError(f"{self.file}: the BOS ids {self.bos} are not all in the model's "
                            f"vocabulary of {vocab_size}; fix them, --bos, or bos_token_id "
                            f"in config.json")

    def _find_bos(self, bos_token_id: int | None) -> list[int]:
        plain = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a").ids
        for start in range(len(full) - len(plain), 0, -1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        if bos_token_id is None:
            raise UserError(f"{self.file}: its post-processor adds no BOS and config.json names no "
                            f"bos_token_id; set bos_token_id in config.json")
        return [bos_token_id]

    def read(self, texts: list[str], template: str, max_tokens: int) -> Tokens:
        """Each text in its template, at most max_tokens with BOS: a longer text is cut."""
        if max_tokens <= len(self.bos):
            raise UserError(f"{max_tokens} tokens leave no room for a text beside BOS; raise the "
                            f"limit")
        if template != "{text}":
            return self.encode_prompted(texts, template, max_tokens)
        ids = self.encode(texts)
        cut = [len(i) > max_tokens for i in ids]
        ids = [i[:max_tokens].copy() if long else i for i, long in zip(ids, cut)]
        return Tokens(ids, [len(i) for i in ids], cut)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One int32 array per text: BOS, then the tokens of the text."""
        arrays = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            for encoding in self.backend.encode_batch_fast(chunk, add_special_tokens=False):
                arrays.append(np.array(self.bos + encoding.ids, dtype=np.int32))
        return arrays

    def encode_prompted(self, texts: list[str], prompt: str, max_tokens: int) -> Tokens:
        """The prompt with each text in place of its `{text}`s.

        Where that makes more than max_tokens the text is cut, never the prompt. Raises UserError if
        the prompt alone leaves no room for a text.
        """
        before_last, (arrays, tails, cut) = prompt.rpartition("{text}")[0], Tokens([], [], [])
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            filled = [prompt.replace("{text}", text) for text in chunk]
            encodings = self.backend.encode_batch(filled, add_special_tokens=False)
            for text, encoding in zip(chunk, encodings):
                cut.append(len(self.bos) + len(encoding.ids) > max_tokens)
                if cut[-1]:
                    text, encoding = self._cut(text, prompt, max_tokens)
                first = len(before_last.replace("{text}", text))  # character of the last text
                arrays.append(np.array(self.bos + encoding.ids, dtype=np.int32))
                tails.append(sum(end > first for _, end in encoding.offsets))
        return Tokens(arrays, tails, cut)

    def _cut(self, text: str, prompt: str, max_tokens: int) -> tuple[str, tokenizers.Encoding]:
        """The longest beginning of the text, in whole tokens, that fits the prompt."""

        def encode(string: str) -> tokenizers.Encoding:
            return self.backend.encode(string, add_special_tokens=False)

        ends, copies = [end for _, end in encode(text).offsets], prompt.count("{text}")
        frame = len(self.bos) + len(encode(prompt.replace("{text}", "")).ids)
        about = (max_tokens - frame) // copies + 2  # where pieces meet, tokens may merge
        for kept in range(min(len(ends), about), 0, -1):
            encoding = encode(prompt.replace("{text}", text[: ends[kept - 1]]))
            if len(self.bos) + len(encoding.ids) <= max_tokens:
                return text[: ends[kept - 1]], encoding
        raise UserError(f"max_tokens={max_tokens} leaves no room for a text in the prompt "
                        f"{prompt[:60]!r}... of {frame} tokens; use a larger one")

    def decode(self, ids) -> str:
        """The text of a sequence of token ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)
