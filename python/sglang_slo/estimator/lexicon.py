"""Words and phrases that tell how long an answer will be: kinds of task, kinds of text, limits on length.

General English, grouped by what the word asks for, not by any data set. `Lexicon.count` looks a whole batch of token
streams up at once; a group's count is one feature. In phrases `#` stands for any number, by digit or by word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_slo.estimator.stream import DIGIT, Stream, from_texts, pair

WORDS: dict[str, str] = {
    "prose": "essay story stories novel article articles blog report speech chapter proposal script screenplay dialogue "
    "conversation monologue biography paper dissertation narrative fanfiction fanfic memoir whitepaper play scene",
    "document": "plan itinerary guide tutorial course curriculum lesson manual documentation roadmap strategy schedule "
    "agenda policy contract agreement template program procedure checklist syllabus",
    "tiny": "title titles headline tagline slogan caption tweet name names word phrase synonym synonyms antonym acronym "
    "keyword keywords hashtag joke riddle pun motto abbreviation emoji nickname username",
    "letter": "email emails mail message memo resume cv cover letter invitation announcement advertisement ad review "
    "newsletter press post description bio note apology complaint",
    "verse": "poem poems song lyrics sonnet rap verse ballad haiku limerick rhyme rhymes hymn ode",
    "code": "code function python java javascript js c cpp cplusplus html css sql class implement algorithm api regex "
    "react rust bash php typescript numpy pandas torch pytorch docker linux json xml django flask query snippet "
    "leetcode compile array integer golang ruby kotlin swift powershell kubernetes terraform excel formula latex",
    "classify": "classify classification categorize category categories label labels sentiment positive negative neutral "
    "identify detect determine choose select pick which decide verify whether option options choice rate score "
    "predict entails entailment",
    "yesno": "true false yes no correct incorrect agree disagree right wrong",
    "extract": "extract find locate spot answer answers question questions entity entities mention mentions passage based "
    "context given",
    "shorten": "summarize summarise summary tldr shorten condense abstract gist simplify",
    "rewrite": "paraphrase rewrite rephrase reword translate translation convert fix edit proofread correct improve grammar "
    "replace fill blank blanks transform format reformat complete rearrange turn modify spelling polish",
    "list": "list lists ideas suggest suggestions recommend recommendations examples example brainstorm tips ways types "
    "things several various bullet points",
    "compare": "compare comparison contrast difference differences versus vs pros cons advantages disadvantages better "
    "similarities tradeoffs",
    "howto": "how steps step instructions guide process method make build create install setup configure prepare",
    "food": "recipe recipes cook cooking bake dish ingredients meal dinner cake soup sauce",
    "explain": "explain describe discuss elaborate analyze analyse evaluate examine explore outline interpret critique "
    "argue justify clarify teach understand",
    "abstract": "impact influence implications relationship role theory history concept effects importance society culture "
    "economy economic political social environmental technology philosophy ethics development future",
    "why": "why reason reasons cause causes because",
    "who": "who whose whom when where capital born date year founded inventor invented named called located largest "
    "smallest oldest tallest president king author wrote directed starring movie actor",
    "number": "calculate compute solve equation sum much percent percentage total average probability multiply divide add "
    "subtract math tip distance height speed price cost miles km kg dollars hours minutes angle area volume",
    "brief": "brief briefly short shortly concise concisely quick quickly only just simple one single sentence less max "
    "maximum limit succinct succinctly exactly short",
    "long": "detailed detail details long longer extensive extensively complete full comprehensive thorough thoroughly "
    "depth multiple every elaborate pages paragraphs lengthy",
    "advice": "should advice help best deal handle manage improve want need struggling feel worried",
    "role": "act pretend imagine roleplay suppose assume persona character",
    "create": "write create generate compose draft design develop come produce invent craft",
    "self": "i my me we our us",
    "you": "you your yourself",
    "chat": "hi hello hey thanks thank please lol bro dude sorry",
    "wh": "what whats",
    "aux": "is are was were do does did can could would will has have",
    "table": "table csv spreadsheet rows columns row column markdown",
    "input": "input output text paragraph sentence tweet following data",
    "lengthunit": "words sentences paragraphs pages lines characters tokens",
}
PHRASES: dict[str, tuple[str, ...]] = {
    "one unit": (
        "# sentence",
        "# word",
        "# line",
        "# paragraph",
        "a sentence",
        "a word",
        "a number",
        "single word",
    ),
    "n units": (
        "# words",
        "# sentences",
        "# paragraphs",
        "# pages",
        "# lines",
        "# characters",
        "# word",
        "# page",
    ),
    "what is": ("what is", "what are", "what was", "what were", "what s"),
    "what if": ("what if", "what would", "what happens", "what happened"),
    "how to": ("how to", "how do", "how can", "how should", "how would", "how does", "how did"),
    "how much": (
        "how many",
        "how much",
        "how old",
        "how far",
        "how long",
        "how tall",
        "how big",
        "how often",
    ),
    "step by": ("step by", "by step"),
    "choose": (
        "yes or",
        "true or",
        "or false",
        "or no",
        "one of",
        "which of",
        "multiple choice",
        "or negative",
    ),
    "who is": (
        "who is",
        "who was",
        "who are",
        "who wrote",
        "who invented",
        "when was",
        "when did",
        "where is",
    ),
    "ask help": (
        "can you",
        "could you",
        "help me",
        "i want",
        "i need",
        "i am",
        "i m",
        "give me",
        "tell me",
        "show me",
    ),
    "act as": ("act as", "you are", "as a", "as an"),
    "a few": (
        "# ideas",
        "# ways",
        "# examples",
        "# tips",
        "# questions",
        "# reasons",
        "# things",
        "a list",
        "# facts",
    ),
    "given": (
        "the following",
        "the given",
        "this text",
        "this sentence",
        "the text",
        "the sentence",
        "the passage",
    ),
    "a story": (
        "a story",
        "an essay",
        "a poem",
        "a song",
        "an article",
        "a blog",
        "a letter",
        "a script",
        "a speech",
    ),
    "a name": (
        "a name",
        "the name",
        "a title",
        "a tweet",
        "a slogan",
        "a headline",
        "a tagline",
        "a caption",
    ),
    "is it": (
        "is it",
        "is this",
        "is the",
        "is there",
        "are there",
        "do you",
        "are you",
        "does the",
        "did the",
    ),
    "output only": (
        "only output",
        "only the",
        "just the",
        "nothing else",
        "no explanation",
        "do not",
        "don t",
    ),
}
GROUPS = [*WORDS, *PHRASES]
_NUMBER_WORDS = "one two three four five six seven eight nine ten twelve fifteen twenty fifty hundred"


def hash_words(words: str) -> NDArray[np.uint64]:
    """Hashes of the space-separated words, as streams have them."""
    return from_texts([words]).hashes


class _Table:
    """Which groups a hash belongs to: sorted (hash, group) pairs, at most `depth` groups per hash."""

    def __init__(self, entries: list[tuple[int, int]]) -> None:
        entries = sorted(set(entries))
        hashes = np.array([h for h, _ in entries], np.uint64)
        self.keys, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        self.groups = np.full((len(self.keys), int(counts.max())), -1, np.intp)
        for row, (start, count) in enumerate(zip(first, counts, strict=True)):
            self.groups[row, :count] = [g for _, g in entries[start : start + count]]

    def hits(self, hashes: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """(position, group) of every match."""
        at = np.minimum(np.searchsorted(self.keys, hashes), len(self.keys) - 1)
        found = np.flatnonzero(self.keys[at] == hashes)
        groups = self.groups[at[found]]
        row, col = np.nonzero(groups >= 0)
        return found[row], groups[row, col]


class Lexicon:
    """The groups above as hash tables."""

    def __init__(self) -> None:
        self._number = hash_words("#")[0]
        self._number_words = np.sort(hash_words(_NUMBER_WORDS))
        words = [(int(h), g) for g, text in enumerate(WORDS.values()) for h in hash_words(text)]
        self._words = _Table(words)
        phrases = [
            (int(pair(h[:1], h[1:2])[0]), len(WORDS) + g)
            for g, texts in enumerate(PHRASES.values())
            for h in map(hash_words, texts)
        ]
        self._phrases = _Table(phrases)

    def hits(self, stream: Stream) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """(position in the stream, group) of every word and phrase of the lexicon that occurs."""
        if len(stream.doc) == 0:
            return np.zeros(0, np.intp), np.zeros(0, np.intp)
        hashes = stream.hashes
        at = np.minimum(np.searchsorted(self._number_words, hashes), len(self._number_words) - 1)
        number = (self._number_words[at] == hashes) | ((stream.flags & DIGIT) > 0)
        canonical = np.where(number, self._number, hashes)
        together = np.flatnonzero(stream.doc[1:] == stream.doc[:-1])
        positions, groups = self._words.hits(hashes)
        starts, phrase_groups = self._phrases.hits(pair(canonical[:-1], canonical[1:])[together])
        return np.append(positions, together[starts]), np.append(groups, phrase_groups)


def count(
    hits: tuple[NDArray[np.intp], NDArray[np.intp]], stream: Stream, keep: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Counts [n, len(GROUPS)] of the hits at positions where `keep` [T] is true, at most 6 each."""
    position, group = hits
    inside = keep[position]
    flat = stream.doc[position[inside]] * len(GROUPS) + group[inside]
    counts = np.bincount(flat, minlength=stream.n * len(GROUPS)).reshape(stream.n, len(GROUPS))
    return np.minimum(counts, 6).astype(np.float32)
