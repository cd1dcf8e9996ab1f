"""Texts that end a completion, found in token ids as they are sampled. Knows how to decode, no tokenizer, no engine."""

from collections.abc import Callable, Sequence

# A token stands for at least one character, except pieces of a character and special tokens: this many of those may lie
# within a stop text. What a window cuts in two at its left cannot matter, because a text found is whole.
_MARGIN = 16


class StopTexts:
    """Looks for the end of any of some texts."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._texts = tuple(texts)
        self._decode = decode
        self._window = max(len(text) for text in texts) + _MARGIN

    def end(self, tokens: Sequence[int], *, new: int) -> int | None:
        """How many of `tokens` make up the completion if a text ends in its last `new` ones, else None.

        The token that completes the text is the last one kept, whatever characters it brings beyond it.
        """
        for length in range(len(tokens) - new + 1, len(tokens) + 1):
            tail = self._decode(tokens[max(0, length - self._window) : length])
            if any(text in tail for text in self._texts):
                return length
        return None
