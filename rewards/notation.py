"""One spelling for an answer: Unicode, LaTeX fonts and spacing, currency and delimiters brought to a plain form."""

import re
import unicodedata
from collections.abc import Callable

MAX_LENGTH = 400  # characters; a longer answer is compared as it stands

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_VULGAR = re.compile("(\\d?)([¼-¾⅐-⅞↉])")
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–—‒﹣", "-"),
        **dict.fromkeys("×·⋅∙∗", "*"),
        **{
            "÷": "/",
            "⁄": "/",
            "∕": "/",
            "∶": ":",
            "。": ".",
            "、": ",",
            "’": "'",
            "‘": "'",
            "“": '"',
            "”": '"',
            "º": "°",
        },
        **{"π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne "},
        **{"∪": "\\cup ", "∈": "\\in ", "±": "\\pm ", "≈": "\\approx ", "∅": "\\emptyset "},
        **{"△": "\\triangle ", "∠": "\\angle ", "∥": "\\parallel ", "⊥": "\\perp ", "α": "\\alpha ", "β": "\\beta "},
        **{"γ": "\\gamma ", "θ": "\\theta ", "λ": "\\lambda ", "φ": "\\phi ", "ω": "\\omega ", "σ": "\\sigma "},
    }
)
_LETTER_END = r"(?![A-Za-z])"
# Applied in this order, each to the result of the one before.
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),  # \( \) \[ \]
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lrm]?|hfill)" + _LETTER_END), " "),
    (re.compile(r"\\(?:color|textcolor)\s*\{[^{}]*\}|\\(?:tiny|small|large|Large|LARGE|huge|Huge)" + _LETTER_END), " "),
    (re.compile(r"\\!|\{,\}(?=\D)"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad" + _LETTER_END + r"|(?<!\\)~|\\n?thinspace" + _LETTER_END), " "),
    (re.compile(r"\\[dtc]frac" + _LETTER_END), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ" + _LETTER_END + r"|°|\{\s*°\s*\})"), "°"),
    (re.compile(r"\\(?:text)?degree" + _LETTER_END + r"|\\circ" + _LETTER_END), "°"),
    (re.compile(r"\{([^{}]*)\\over" + _LETTER_END + r"([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\colon" + _LETTER_END), ":"),
    (re.compile(r"\s*\^\s*(?:\\prime" + _LETTER_END + r"|\{\s*\\prime\s*\})|[′]"), "'"),
    (re.compile(r"\\langle" + _LETTER_END), "("),
    (re.compile(r"\\rangle" + _LETTER_END), ")"),
    (re.compile(r"\\(?:times|cdot|ast)" + _LETTER_END + r"|(?<=\d)\s*[xX]\s*(?=10\s*\^)"), "*"),
    (re.compile(r"\\log\s*_\s*(?:e" + _LETTER_END + r"|\{e\})"), r"\\ln "),
    (re.compile(r"\\div" + _LETTER_END), "/"),
    (re.compile(r"\\(?:leq|leqslant|leqq)" + _LETTER_END + r"|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)" + _LETTER_END + r"|>="), r"\\ge "),
    (re.compile(r"\\lt" + _LETTER_END), "<"),
    (re.compile(r"\\gt" + _LETTER_END), ">"),
    (re.compile(r"\\neq" + _LETTER_END + r"|!="), r"\\ne "),
    (re.compile(r"(?<=[\d}])\s*(?:per\s?cent|pct)\b", re.IGNORECASE), "%"),
    (re.compile(r"=="), "="),
    (re.compile(r"\\([%$#_&])"), r"\1"),
    (re.compile(r"\\(?:euro|EUR)" + _LETTER_END), "€"),
    (re.compile(r"\\pounds" + _LETTER_END), "£"),
    (re.compile(r"\\(?:yen|textyen)" + _LETTER_END), "¥"),
    (re.compile(r"\\mu" + _LETTER_END + r"\s?"), "μ"),
    (re.compile(r"\\Omega" + _LETTER_END), "Ω"),
    (re.compile(r"(\d*)\.(\d*)\\(?:overline|dot|bar)\s*\{(\d{1,9})\}"), lambda match: _repeating(*match.groups())),
    (re.compile(r"(?<=[)\]])\s*U\s*(?=[(\[])"), r" \\cup "),
    (re.compile(r"\\varnothing" + _LETTER_END + r"|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\mathbb\s*(?:R|\{R\})(?!\s*[\^_])|\ball real numbers\b"), r"(-\\infty,\\infty)"),
    (re.compile(r"\\infin(?:ity)?" + _LETTER_END + r"|\binfinity\b"), r"\\infty "),
]
_WRAPPERS = "boxed|text|textbf|textit|textrm|textsf|texttt|textnormal|emph|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt"
_BRACES = re.compile(
    r"\\(?:" + _WRAPPERS + r"|underline|bm|boldsymbol|pmb|operatorname\*?|rm|bf)\s?\{|\\.|[{}]", re.DOTALL
)
_LEAD = re.compile(
    r"^(?:[\s=:]|\\approx" + _LETTER_END + r"|~|(?:the\s)?(?:final\s)?answer\sis\b|answer:|approximately\b|approx\.?\s|"
    r"about\b|答案是?[::]?|选项?(?=[A-Z])|约|大约|\\therefore)+",
    re.IGNORECASE,
)
_SIGN_WORD = re.compile(r"^(?:negative|minus|负)\s*(?=[\d\\.])", re.IGNORECASE)
_OPTION_COMMA = re.compile(r"^([A-H]),\s*(?=[^\sA-Za-z])")  # the Chinese way to name an option and its text
_DIGIT_GAP = re.compile(r"(?<=\d)\s+(?=\d)")
_ARTICLES = {"a", "an", "the"}
_INNER_POINT = re.compile(r"(?<=\d)\.(?=\d)")
_TEXT_NOISE = re.compile(r"[\s,;:!?'\".()\[\]{}$\\_、·]+|(?<=\w)-(?=\w)|-(?!\d)")


def clean(text: str) -> str:
    """The plain spelling of an answer; linear in its length, up to brace nesting of any depth."""
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda match: match[1] + " " + unicodedata.normalize("NFKC", match[2]), text)
    text = unicodedata.normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = _unwrap(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(_money(text).split()).replace(" ^", "^")
    if text.startswith("**") and text.endswith("**"):  # Markdown's bold
        text = text[2:-2]
    text = _SIGN_WORD.sub("-", _OPTION_COMMA.sub(r"\1. ", _LEAD.sub("", text)))
    return text if text.endswith("..") else text.rstrip(" .;,\\").strip()


def _unwrap(text: str) -> str:
    """Drop \\text{...} and its like, keeping what is inside; other braces stay."""
    out: list[str] = []
    opened: list[str] = []
    end = 0
    for token in _BRACES.finditer(text):
        out.append(text[end : token.start()])
        end, piece = token.end(), token.group()
        if piece.endswith("{") and len(piece) != 2:
            opened.append("}" if piece == "{" else " ")
            out.append("{" if piece == "{" else " ")
        else:
            out.append((opened.pop() if opened else "}") if piece == "}" else piece)
    return "".join(out) + text[end:]


def _money(text: str) -> str:
    """Drop the dollar signs that delimit math; an odd one, or one ahead of each number, is a currency."""
    if text.count("$") % 2 == 0 or text.startswith("$$"):
        return text.replace("$", " ")
    return text


def _repeating(whole: str, fixed: str, cycle: str) -> str:
    """0.1\\overline{6} as a fraction."""
    high, low = int(whole + fixed + cycle), int(whole + fixed or "0")
    return rf"\frac{{{high - low}}}{{{(10 ** len(cycle) - 1) * 10 ** len(fixed)}}}"


def squash(text: str) -> str:
    """A cleaned text without any space but those between digits: equal ones are the same answer in every type."""
    return "".join(_DIGIT_GAP.sub("\0", text).split()).replace("\0", " ")


def text_key(text: str) -> str:
    """What two spellings of one word or phrase share: case, articles and punctuation do not count."""
    marked = _INNER_POINT.sub("\0", text.casefold())
    words = _TEXT_NOISE.sub(" ", marked).replace("\0", ".").split()
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(kept or words)
