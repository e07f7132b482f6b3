"""A client of a running server: each request may choose its policy, or a cap on the draft length.

moecascade serve local --port 8000        (in another terminal)
python examples/openai_client.py [URL]    (by default http://127.0.0.1:8000)
"""

from __future__ import annotations

import sys
import time

from openai import BadRequestError, OpenAI

PROMPT = "Repeat this list three times: red, orange, yellow, green, blue, indigo, violet."


def main() -> None:
    """Ask the same under three settings; then ask for a policy that does not exist."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    for chosen in ({}, {"cascade_max_k": 2}, {"cascade_policy": "off"}):
        began = time.perf_counter()
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": PROMPT}],
            temperature=0.0,
            max_tokens=64,
            extra_body={"vllm_xargs": chosen},
        )
        tokens = answer.usage.completion_tokens if answer.usage else 0
        print(
            f"{chosen or 'as the server is set'}: {tokens / (time.perf_counter() - began):.1f}"
            " tokens a second"
        )
    try:
        client.completions.create(
            model=model, prompt="Hello", extra_body={"vllm_xargs": {"cascade_policy": "marginl"}}
        )
    except BadRequestError as error:
        print(f"refused: {error.message}")


if __name__ == "__main__":
    main()
