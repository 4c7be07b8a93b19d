"""Documents that nobody would write by hand, and the property that every parser has to have: what
it is given it reads, or it says in one line what is wrong.

    make fuzz                     100,000 inputs a parser
    SHIP_DS_FUZZ=2000 pytest ...  as many as that

`hypothesis` draws a document, which takes it longer than most parsers take to read it. So from a
thousand inputs on each document comes with damaged copies of itself, which are inputs, too.
"""

import json
import os
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ship_ds.errors import UserError

NUM_INPUTS = int(os.environ.get("SHIP_DS_FUZZ", "40"))
NUM_COPIES = 10 if NUM_INPUTS >= 1000 else 1
"""Inputs that come of a document; the first is the document as it is."""
fuzz = settings(
    max_examples=NUM_INPUTS // NUM_COPIES,
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


_SEEDS = st.integers(0, 2**32)
_PIECES = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r\n", b"\t", b"\0", b"\xff", b"- "),
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"0x1", b'""', b"{}", b"[]", b'"\\ud800"'),
    b"\xef\xbb\xbf",
)


def copies(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes]]:
    """A content, and copies of it that are damaged once to four times."""

    def copy(content: bytes, seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [content, *(_damaged(content, rng) for _ in range(NUM_COPIES - 1))]

    return st.builds(copy, contents, _SEEDS)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """With a bit turned, a piece put in, a stretch left out, doubled, moved or cut off."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(content))
        end = min(len(content), start + rng.choice((1, 2, 4, 16, 64)))
        stretch, rest = content[start:end], content[end:]
        match rng.randrange(6):
            case 0 if stretch:
                turned = bytes([stretch[0] ^ (1 << rng.randrange(8))])
                content = content[:start] + turned + stretch[1:] + rest
            case 1:
                content = content[:start] + rng.choice(_PIECES) + content[start:]
            case 2:
                content = content[:start] + rest
            case 3:
                content = content[:start] + stretch + stretch + rest
            case 4:
                place = rng.randint(0, start)
                content = content[:place] + stretch + content[place:start] + rest
            case _:
                content = content[:start] if rng.random() < 0.2 else content[:start] + rest
    return content


def variants(documents: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """A document of JSON values, and copies of it that have some values in the places of others."""

    def vary(document: Any, seed: int) -> list[Any]:
        rng = random.Random(seed)
        text = json.dumps(document)
        return [document, *(_varied(json.loads(text), rng) for _ in range(NUM_COPIES - 1))]

    return st.builds(vary, documents, _SEEDS)


_ODD_VALUES: tuple[Any, ...] = (None, True, -1, 0.5, 10**400, 1e999, "", "x", [], {}, ["x"], [[]])


def _varied(document: Any, rng: random.Random) -> Any:
    places = [
        (inner, key) for inner in _inside(document) for key in _keys(inner)
    ]  # of a text or number alone there are none
    for _ in range(rng.randint(1, 4) if places else 0):
        inner, key = rng.choice(places)
        other, other_key = rng.choice(places)
        values_there = [*_ODD_VALUES, *([other[other_key]] if other_key in _keys(other) else [])]
        if key in _keys(inner):
            # A copy, or a document could hold itself.
            inner[key] = json.loads(json.dumps(rng.choice(values_there)))
    return document


def _inside(document: Any) -> list[Any]:
    """The objects and lists of a document, from the outermost on."""
    if not isinstance(document, dict | list):
        return []
    values_there = document.values() if isinstance(document, dict) else document
    return [document, *(one for value in values_there for one in _inside(value))]


def _keys(inner: Any) -> list[Any]:
    return list(inner) if isinstance(inner, dict) else list(range(len(inner)))


def reads_or_says(parse: Callable[[], object]) -> None:
    """Call it; any other exception than a UserError of one line fails the test."""
    try:
        parse()
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
