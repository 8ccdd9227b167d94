"""Small texts for corpora, and what stands in the shards that are made of them."""

from pathlib import Path

import numpy as np

from sweeps import builds, shards
from sweeps.corpora import CorpusInfo, Source, make_source

WORDS = [
    "red",
    "green",
    "blue",
    "north",
    "south",
    "east",
    "west",
    "one",
    "two",
    "three",
    "señor",
    "Ωmega",
    "漢字",
    "tab",
    "newline",
]


def text(seed: int, words: int = 120) -> str:
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, words)) + f" {seed}\n"


def folder_source(place: Path, **options: object) -> Source:
    return make_source("folder", str(place), options)


def stream(root: Path, info: CorpusInfo, name: str = "train") -> np.ndarray:
    _, streams = builds.read_meta(root / "corpora" / info.fingerprint)
    reader = shards.StreamReader(root / "corpora" / info.fingerprint, streams[name])
    return np.concatenate(reader.shards)


def documents_of(tokens: np.ndarray, separator: int) -> list[bytes]:
    return tokens.astype(np.uint8).tobytes().split(bytes([separator]))[:-1]
