"""The arguments of the commands that generate text: generate, chat, serve."""

from __future__ import annotations

from lowbitq.arguments import Parser, bits_option, model_argument, positive, utf8


def generate(parser: Parser) -> None:
    model_argument(parser)
    prompts = "a text to continue, or several; -: standard input without its last line break"
    parser.add_argument("prompts", type=utf8, nargs="+", metavar="PROMPT", help=prompts)
    kinds = parser.add_mutually_exclusive_group()
    chat = "treat each prompt as a message to answer"
    kinds.add_argument("--chat", action="store_true", help=chat)
    said = 'each prompt is a file of messages, a JSON list like [{"role": "user", "content": "Hi"}]'
    kinds.add_argument("--messages", action="store_true", help=said)
    bits_option(parser)
    _sampling_options(parser, max_new_tokens=64)
    parser.add_argument("--cache-bits", type=int, default=32, help="cache precision, 8 or 32")


def chat(parser: Parser) -> None:
    model_argument(parser)
    bits_option(parser)
    parser.add_argument("--system", type=utf8, metavar="TEXT", help="what the model is told first")
    _sampling_options(parser, max_new_tokens=256)


def serve(parser: Parser) -> None:
    model_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=positive, default=8000, help="port to listen on")
    token = "that clients must send; needed for a --host that others can reach"
    parser.add_argument("--token", help=f"{token} (default: the variable LOWBITQ_TOKEN)")
    parser.add_argument("--name", default="lowbitq", help="what clients call the model")
    parser.add_argument("--seconds", type=float, default=600.0, help="most time for one answer")
    parser.add_argument("--waiting", type=positive, default=64, help="most requests at a time")


def _sampling_options(parser: Parser, *, max_new_tokens: int) -> None:
    most = "maximum number of new tokens"
    parser.add_argument("--max-new-tokens", type=positive, default=max_new_tokens, help=most)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token")
    parser.add_argument("--top-k", type=positive, help="choose among this many tokens")
    parser.add_argument("--top-p", type=float, help="choose among tokens of this total probability")
    least = "drop tokens with less than this share of the highest probability"
    parser.add_argument("--min-p", type=float, help=least)
    penalty = "above 1: make tokens that have occurred less probable"
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help=penalty)
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling")
