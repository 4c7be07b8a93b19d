"""Documents that nobody would write by hand, and the property that every parser has to have: what
it is given it reads, or it says in one line what is wrong.

    make fuzz                     100,000 inputs a parser
    SHIP_DS_FUZZ=2000 pytest ...  as many as that
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ship_ds.errors import UserError

NUM_INPUTS = int(os.environ.get("SHIP_DS_FUZZ", "40"))
fuzz = settings(
    max_examples=NUM_INPUTS,
    deadline=timedelta(seconds=20),  # a hang; the machine may be busy
    database=None,
    derandomize=NUM_INPUTS < 1000,
    suppress_health_check=list(HealthCheck),
)

_ODD_TEXTS = st.sampled_from(
    [
        *("", " ", "\x00", "\ufeff", "\u2028", "\ud800", "../../x", "/etc/passwd", "~", "$HOME"),
        *("<eos>", "auto", "null", "9" * 5000, "1e999", "*a", "&a [*a]", "!!python/name:os.system"),
        "x" * 5000,
    ]
)
_NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400), st.booleans(), st.none())


def values(keys: list[str], words: list[str] = []) -> st.SearchStrategy[Any]:  # noqa: B006
    """JSON values whose objects have these keys, and others, and whose texts are these words, and
    others."""
    texts = st.one_of(st.sampled_from([*keys, *words]), st.text(max_size=20), _ODD_TEXTS)
    return st.recursive(
        st.one_of(texts, _NUMBERS),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(st.sampled_from(keys), texts), inner, max_size=6),
        ),
        max_leaves=25,
    )


@st.composite
def changed(draw: Callable[..., Any], document: Any, replacements: st.SearchStrategy[Any]) -> Any:
    """A right document in which up to three values are others, or gone."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 3))):
        at = document
        while isinstance(at, dict | list) and at:
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                if draw(st.booleans()):
                    at[key] = draw(replacements)
                else:
                    del at[key]
                break
            at = inner
    return document


@st.composite
def broken(draw: Callable[..., Any], texts: st.SearchStrategy[str]) -> bytes:
    """A text's bytes, whole, cut short, with bytes put in, or twice."""
    content = draw(texts).encode(errors="surrogatepass")
    match draw(st.integers(0, 4)):
        case 0:
            return content[: draw(st.integers(0, len(content)))]
        case 1:
            place = draw(st.integers(0, len(content)))
            return content[:place] + draw(st.binary(max_size=8)) + content[place:]
        case 2:
            return content + content
        case _:
            return bytes(content)


def files(document: Any, keys: list[str]) -> st.SearchStrategy[bytes]:
    """A JSON file: this one changed, any other, or none."""
    others = values(keys)
    jsons = st.one_of(changed(document, others), others).map(json.dumps)
    return st.one_of(broken(jsons), st.binary(max_size=60))


def reads_or_says(parse: Callable[[], object]) -> None:
    """Call it; any other exception than a UserError of one line fails the test."""
    try:
        parse()
    except UserError as error:
        assert str(error) and "\n" not in str(error)[:-1], str(error)
