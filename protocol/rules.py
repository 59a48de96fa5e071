"""Bounds of a request that the gateway checks with words for the client, and a worker before it relies on them."""

import re
from typing import Final

MAX_STOPS: Final = 4
#: A stop string is searched for in each piece of text, so its length is bounded.
MAX_STOP_CHARS: Final = 1024
MAX_TOP_LOGPROBS: Final = 20
MAX_TOOLS: Final = 128
MAX_TEMPLATE_ARGS_BYTES: Final = 16 * 1024
#: OpenAI's rule for the names of functions.
TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
#: What the server itself passes to a chat template; nothing of that may come from a request.
RESERVED_ARGS: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
