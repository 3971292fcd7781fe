"""Made-up traffic whose lengths follow from its features, for tests of the estimator."""

from __future__ import annotations

import numpy as np

from sglang_slo.estimator.features import ArrivalFeatures

TASKS = {
    "Write a detailed essay about": 6.6,
    "Summarize in one sentence": 3.4,
    "Classify the sentiment of": 1.8,
    "Explain step by step how to build": 6.0,
}
TOPICS = [
    "rivers",
    "bridges",
    "trade",
    "music",
    "chess",
    "cheese",
    "engines",
    "gardens",
    "comets",
    "pottery",
    "sailing",
    "optics",
]
CLASS_LOGS = {"chat": 5.0, "code": 3.0, "batch": 6.5}


def prompt(rng: np.random.Generator) -> tuple[str, float]:
    """A prompt and the natural log of its answer's length in tokens."""
    task = list(TASKS)[rng.integers(len(TASKS))]
    topic = " and ".join(rng.choice(TOPICS, 2, replace=False))
    return f"{task} {topic} number {rng.integers(10_000)}.", TASKS[task] + 0.3 * rng.normal()


def prompts(n: int, seed: int = 0) -> tuple[list[ArrivalFeatures], np.ndarray]:
    """Requests with text and their lengths in tokens."""
    rng = np.random.default_rng(seed)
    made = [prompt(rng) for _ in range(n)]
    lengths = np.maximum(1, np.exp([log for _, log in made])).astype(int)
    return [ArrivalFeatures(2048, text=text) for text, _ in made], lengths


def by_class(rng: np.random.Generator, shares: tuple[float, float, float]) -> tuple[ArrivalFeatures, int]:
    """A request without text whose length follows from its class and prompt length; shares of chat, code, batch."""
    name = list(CLASS_LOGS)[rng.choice(3, p=shares)]
    size = int(rng.integers(20, 2000))
    log = CLASS_LOGS[name] + 0.2 * np.log(size / 100) + 0.5 * rng.normal()
    return ArrivalFeatures(8192, prompt_tokens=size, slo_class=name), max(1, int(np.exp(log)))
