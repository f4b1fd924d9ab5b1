"""The language of texts, from their letters and their most common words."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

WORDS = {
    "English": "the of and to in is that for with it on as are was this be by from or an at not have which",
    "German": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an",
    "French": "de la le et les des en un une du est que dans qui par pour au sur pas plus il ne se ce avec",
    "Spanish": "de la que el en y a los del se las por un para con no una su al lo es como más pero",
    "Italian": "di e il la che in un a per è una sono con non si da le dei del della i al più come",
    "Portuguese": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas",
    "Dutch": "de het een en van in is dat op te zijn met voor niet aan er die om ook als bij maar",
    "Polish": "i w na z się nie do to jest że o jak za od po przez są ale dla być",
    "Swedish": "och i att det som en på är av för med den till inte har de om ett var jag",
}
"""Common words of the languages that are written in Latin letters."""
SCRIPTS = {
    "CJK": "Chinese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "CYRILLIC": "Cyrillic letters",
    "ARABIC": "Arabic letters",
    "HEBREW": "Hebrew",
    "GREEK": "Greek",
    "DEVANAGARI": "Devanagari letters",
    "THAI": "Thai",
}
"""Language, or script of several languages, by the first word of the Unicode names of its letters."""
FEWEST_COMMON = 0.08
"""Smallest fraction of common words in texts of a language."""
FEWEST_DIFFERENT = 2
"""Smallest number of different common words in texts of a language."""
MOST_LETTERS = 20_000
"""Number of letters that are examined."""
JAPANESE_FRACTION = 0.1
"""Smallest fraction of kana in Japanese, which also has Chinese letters."""


def language_of(texts: Sequence[str]) -> str:
    """Return the name of the language of texts, or an empty string if it is not recognised."""
    text = " ".join(texts)[: 10 * MOST_LETTERS]
    letters = [letter for letter in text if letter.isalpha()][:MOST_LETTERS]
    if not letters:
        return ""
    scripts = Counter(SCRIPTS.get(unicodedata.name(letter, "").split(" ")[0].split("-")[0], "") for letter in letters)
    if scripts["Japanese"] >= JAPANESE_FRACTION * len(letters):
        return "Japanese"
    name, count = scripts.most_common(1)[0]
    if name and 2 * count > len(letters):
        return name
    words = re.findall(r"[^\W\d_]+", text.lower())
    common = {language: set(listed.split()) for language, listed in WORDS.items()}
    fractions = {
        language: sum(word in listed for word in words) / max(1, len(words)) for language, listed in common.items()
    }
    best = max(fractions, key=lambda language: fractions[language])
    different = common[best] & set(words)
    return best if fractions[best] >= FEWEST_COMMON and len(different) >= FEWEST_DIFFERENT else ""
