"""Words and phrases that tell how long an answer will be: kinds of task, kinds of text, limits on length.

General English, grouped by what the word asks for, not by any data set. `Lexicon.count` looks a whole batch of token
streams up at once; a group's count is one feature. In phrases `#` stands for any number, by digit or by word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator.stream import DIGIT, HashSet, Stream, from_texts, pair

WORDS: dict[str, str] = {
    "prose": "essay story stories novel article articles blog post report speech chapter letter "
    "proposal script screenplay dialogue conversation monologue biography paper "
    "dissertation plan itinerary guide tutorial course curriculum lesson manual thesis "
    "documentation narrative fanfiction",
    "tiny": "title titles headline headlines tagline slogan caption haiku tweet name names word "
    "words phrase sentence synonym antonym acronym keyword keywords hashtag joke riddle "
    "pun motto abbreviation emoji limerick",
    "letter": "email emails mail message memo resume cv cover invitation announcement advertisement "
    "ad review press note",
    "verse": "poem poems song lyrics sonnet rap verse ballad haiku limerick rhyme",
    "code": "code function program python java javascript js c cpp html css sql script implement "
    "class algorithm api regex react rust bash php typescript numpy pandas torch docker "
    "linux json xml django flask node query snippet leetcode compile array string integer",
    "classify": "classify classification categorize category categories label sentiment positive "
    "negative neutral true false yes no identify detect determine choose select pick "
    "which decide verify check correct incorrect whether option options multiple choice "
    "answer",
    "extract": "extract summarize summary summarise tldr paraphrase rewrite rephrase simplify "
    "translate translation convert correct fix edit proofread shorten condense replace "
    "fill blank blanks transform format reformat complete",
    "list": "list lists ideas suggest suggestions recommend recommendations examples example "
    "brainstorm tips ways steps types reasons things table compare comparison pros cons "
    "advantages disadvantages",
    "howto": "how make cook recipe recipes bake install build create setup fix clean instructions "
    "step steps dish ingredients workout exercise",
    "explain": "explain describe discuss analyze analyse elaborate detail detailed details thorough "
    "comprehensive indepth essay evaluate impact influence implications relationship role "
    "theory history concept effects causes importance",
    "why": "why reason reasons cause causes because",
    "fact": "who when where whose capital born date year founded inventor named called located "
    "first largest oldest president",
    "number": "calculate compute solve equation sum number many much percent percentage total "
    "average probability multiply divide add subtract math tip convert height distance "
    "old age far tall",
    "brief": "brief briefly short concise concisely quick quickly only just simple simply one "
    "single sentence sentences few less without max maximum limit",
    "long": "detailed long longer detail extensive complete full comprehensive many words 500 "
    "1000 2000 300 400 pages paragraphs multiple each every thorough several",
    "advice": "should advice help best can could need want improve better good tips deal handle "
    "strategies manage",
    "role": "act pretend imagine role roleplay suppose assume you are as if character",
    "create": "write create generate compose draft design develop come make produce invent craft",
    "self": "i my me we our you your",
    "chat": "hi hello hey thanks thank please lol bro dude",
}
FIRST: dict[str, str] = {
    "ask": "what who when where which is are do does did can could would will was were has have",
    "wh": "what whats which",
    "who": "who when where whose",
    "write": "write create generate compose draft design develop make",
    "explain": "explain describe discuss analyze compare",
    "list": "list name suggest give provide recommend",
    "how": "how",
    "why": "why",
    "talk": "i my we hi hello hey",
}
PHRASES: dict[str, str] = {  # separated by slashes
    "one unit": "# sentence/# word/# line/# paragraph/a sentence/a word/a number/single word",
    "n units": "# words/# sentences/# paragraphs/# pages/# lines/# characters",
    "n things": "list #/give #/me #/name #/suggest #/write #/generate #/provide #/tell #/# ideas/# ways/# examples/"
    "# tips/# questions/# reasons/# things/# facts",
    "what is": "what is/what are/what was/what were/what s",
    "how to": "how do/how can/how to/how should/how would",
    "how much": "how many/how much/how old/how far/how long/how tall/how big",
    "what if": "what if",
    "step by step": "by step",
    "yes or no": "or no/or false/or not/or negative",
    "can you": "can you/could you/would you/will you",
    "who is": "who is/who was/who are/who were/who did/who wrote",
    "is it": "is it/is this/is the/is there/are there",
    "do you": "do you/are you/did you",
    "example": "an example/for example/example #/examples of/example :",
    "given": "the following/the given/this text/this sentence/this paragraph/this passage/the text/the sentence/"
    "the paragraph/the passage/the article/the tweet/the review",
    "as a": "as a/as an/act as/you are",
    "only": "only output/only the/just the/nothing else/no explanation/without explanation",
}
GROUPS = [*WORDS, *FIRST, *PHRASES]
_NUMBER_WORDS = "one two three four five six seven eight nine ten twelve fifteen twenty fifty hundred"


def hash_words(words: str) -> NDArray[np.uint64]:
    """Hashes of the space-separated words, as streams have them."""
    return from_texts([words]).hashes


class _Table:
    """Which groups a hash belongs to: sorted (hash, group) pairs, at most `depth` groups per hash."""

    def __init__(self, entries: list[tuple[int, int]]) -> None:
        entries = sorted(set(entries))
        hashes = np.array([h for h, _ in entries], np.uint64)
        keys, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        self._keys = HashSet(keys)
        self.groups = np.full((len(keys), int(counts.max())), -1, np.intp)
        for row, (start, count) in enumerate(zip(first, counts, strict=True)):
            self.groups[row, :count] = [g for _, g in entries[start : start + count]]

    def hits(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """(position, group) of every match."""
        at, there = self._keys.find(hashes)
        found = np.flatnonzero(there)
        groups = self.groups[at[found]]
        row, col = np.nonzero(groups >= 0)
        return found[row], groups[row, col]


class Lexicon:
    """The groups above as hash tables."""

    def __init__(self) -> None:
        self._number = hash_words("#")[0]
        self._number_words = HashSet(hash_words(_NUMBER_WORDS))
        self._words = _Table([(int(h), g) for g, text in enumerate(WORDS.values()) for h in hash_words(text)])
        openers = enumerate(FIRST.values(), len(WORDS))
        self._first = _Table([(int(h), g) for g, text in openers for h in hash_words(text)])
        phrases = [
            (int(pair(h[:1], h[1:2])[0]), g)
            for g, texts in enumerate(PHRASES.values(), len(WORDS) + len(FIRST))
            for h in map(hash_words, texts.split("/"))
        ]
        self._phrases = _Table(phrases)

    def hits(self, stream: Stream) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """(position in the stream, group) of every word and phrase of the lexicon that occurs."""
        if len(stream.doc) == 0:
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        hashes = stream.hashes
        number = self._number_words.has(hashes) | ((stream.flags & DIGIT) > 0)
        canonical = np.where(number, self._number, hashes)
        together = np.flatnonzero(stream.doc[1:] == stream.doc[:-1])
        firsts = np.flatnonzero(np.append(True, stream.doc[1:] != stream.doc[:-1]))
        at_words, words = self._words.hits(hashes)
        at_first, first = self._first.hits(hashes[firsts])
        at_pair, phrases = self._phrases.hits(pair(canonical[:-1], canonical[1:])[together])
        positions = np.concatenate([at_words, firsts[at_first], together[at_pair]])
        return positions, np.concatenate([words, first, phrases])


def count(
    hits: tuple[NDArray[np.intp], NDArray[np.intp]], stream: Stream, keep: NDArray[np.bool_], groups: int
) -> NDArray[np.float32]:
    """Counts [n, groups] of the hits of the first `groups` groups at positions where `keep` [T]; at most 6 each."""
    position, group = hits
    inside = keep[position] & (group < groups)
    flat = stream.doc[position[inside]] * groups + group[inside]
    counts = np.bincount(flat, minlength=stream.n * groups).reshape(stream.n, groups)
    return np.minimum(counts, 6).astype(np.float32)
