"""What a chat model reads of a message."""

from typing import Any


def chat_text(tokenizer: Any, message: str) -> str:
    """A user's message in the tokenizer's chat template, up to where the answer begins.

    It holds the special tokens, so that it is tokenized with ``add_special_tokens=False``.

    Raises:
        ValueError: an empty message; a tokenizer without a template.

    >>> import regard
    >>> _, tokenizer = regard.mini()
    >>> tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}\\n{% endfor %}"
    >>> chat_text(tokenizer, "What is the code of Ada?")
    '<s>What is the code of Ada?\\n'
    """
    if not message.strip():
        raise ValueError("the text is empty")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template: leave out --chat, or load a chat model")
    messages = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
