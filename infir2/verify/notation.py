r"""One notation for answers in Unicode, full-width and Chinese signs, LaTeX spellings, plain text.

`canonical("２≤x≤√5")` is `2\le x\le \sqrt{5}`. Only the spelling changes, never a value.
"""

import re
import unicodedata
from itertools import pairwise

from infir2.verify.numerals import digits_of_chinese, written_numbers

ROW = "\ue000"  # stands for `\\` between the rows of a matrix
MAX_NESTING = 40

_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ",
    "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "⟨": r"\langle ", "⟩": r"\rangle ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ",
    "φ": r"\varphi ", "ω": r"\omega ", "…": r"\ldots ", "、": ",", "。": ".", "，": ",",
    "；": ";", "：": ":", "（": "(", "）": ")", "【": "[", "】": "]", "£": r"\$", "€": r"\$",
    "¥": r"\$", "￥": r"\$", "℃": r"^\circ C", "℉": r"^\circ F", "º": r"^\circ ",
    "˚": r"^\circ ", "⁄": "/", "或": r"\text{ or }", "和": r"\text{ and }",
    "与": r"\text{ and }", "′": "'", "″": "''", "∠": r"\angle ", "△": r"\triangle ", ROW: " ",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FRACTIONS = re.compile("[¼-¾⅐-⅞]")

_SPELLINGS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:text|mathrm)\s*\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"\\(?:dfrac|tfrac|cfrac|nicefrac|sfrac)(?![A-Za-z])", r"\\frac"),
        (rf"{ROW} ?\[[\d.]+ ?(?:pt|em|ex|mm|cm)\]", ROW),
        (r"\\(?:left|right)\s*(?:\.|(?=[^\w\s]))|\\[bB]igg?[lr]?(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|checkmark|small|large|Large)(?![A-Za-z])", ""),
        (r"\\(?:bf|rm|it|sf|tt)(?![A-Za-z])", ""),
        (r"\\(?:text)?color\{[^{}]*\}", ""),
        (
            r"(?<=\d)(?:\\,|\\;|\\:|\\ |~|\\thinspace|\{,\}|\\!,|,\\!|[_\u2009\u202f\u00a0'’])"
            r"(?=\d{3}(?!\d))",
            "\N{THIN SPACE}",
        ),
        (r"\\!", ""),
        (r"\\colon(?![A-Za-z])", ":"),
        (r"\\(?:,|;|:|q?quad(?![A-Za-z])|enspace|thinspace| )|~|[\u00a0\u202f]", " "),
        (r"\\le(?:q|qslant|qq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\ge(?:q|qslant|qq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:neq|not\s*=)(?![A-Za-z])|!=", r"\\ne "),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:dots|cdots|ldots|dotsc|dotsb)(?![A-Za-z])|\.\.\.+", r"\\ldots "),
        (
            r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"
            r"|(?<=\d)\^(?:\{o\}|o(?![A-Za-z]))",
            r"^\\circ ",
        ),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"),
        (r"\\mid(?![A-Za-z])", "|"),
        (r"\\(?:land|wedge)(?![A-Za-z])|\\&", r"\\text{ and }"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10} "),
        (r"\\(?:lor|vee)(?![A-Za-z])", r"\\text{ or }"),
        (r"(\\sqrt(?:\[\d+\])?) ?([0-9A-Za-z])", r"\1{\2}"),
        (r"\\operatorname\*?\{([ei])\}", r"\1"),
        (r"\\operatorname\*?\{(\w+)\}", r"\\\1 "),
        (r"\\text\{([0-9A-F]+)\}(?=_)", r"\1"),
        (  # 1011 (base 2)
            r"(?<=[0-9A-F)])[ _{]*\(?(?:\\text\{)?[ (]*base ?\}? ?(\d+|[a-z]+)[ )}]*$",
            r"_{\1}",
        ),
        (r"\](?=[^,;])([^][(),;]+)[,;]([^][(),;]+)(?=[][])", r"(\1,\2"),  # ]1,2[
        (r"([(\[][^][(),;]+[,;][^][(),;]+)\[", r"\1)"),
        (r"百分之([\d.]+)", r"\1\\%"),
        (r"^(\d+)分之(\d+)$", r"\\frac{\2}{\1}"),
        (r"^(?:一?共|总共)有?(?=\d)", ""),
        (r"(?<=\d)百", r"\\times10^{2}"),
        (r"(?<=\d)千(?![米克瓦])", r"\\times10^{3}"),
        (r"(?<=\d)万", r"\\times10^{4}"),
        (r"(?<=\d)亿", r"\\times10^{8}"),
        (r"^([\u4e00-\u9fff]*[值数积长率径角])[为是]:?", r"\\text{\1}="),
        (r"\\(?:mathbb|Bbb|mathbf)\s*\{?\s*([RZ])(?![A-Za-z])\s*\}?", r"\\mathbb{\1}"),
        (r"(?<![\d)}])\\(?:mathrm|text|mathit)\s*\{\s*([A-Za-z])\s*\}", r"\1"),
        (r"\\(?:mathrm|text|mathit)\s*\{([A-Za-fi-kn-rt-z])\}", r"\1"),  # 2\text{m} is in meters
        (r"\\mathrm\s+([A-Za-z])(?![A-Za-z])", r"\1"),
        (r"\\text\s*\{\s*(\\?\$|\^\\circ|\\pi)\s*\}", r"\1 "),
        (r"\\text\s*\{\s*pi\s*\}", r"\\pi "),
        (r"\\(?:textbf|textit|textrm|textsf|textnormal|mbox|hbox|mathsf)(?![A-Za-z])", r"\\text"),
        (r"(?<!\d)\\(?:text|mathrm)\s*\{\s*(\d[\d.,]*|0[xbo]\w+)\s*\}", r"\1"),
        (r"\\(?:text|mathrm)\s*\{\s*(?=\\(?:frac|sqrt|boxed|mathbf)(?![A-Za-z]))", r"\\mathit{"),
        (r"\\mathrm\{", r"\\text{"),
        (r"\\\(|\\\)|\\\[|\\\]", ""),
        (r"\*\*(?=\s*[\d({a-z-])(?<=[\w)}]\*\*)", "^"),
        (r"\*\*|__|`", ""),
        (r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<![\\A-Za-z])(?:pi|Pi)(?![A-Za-z])", r"\\pi "),
        (
            r"(?<![\\A-Za-z])(sin|cos|tan|cot|sec|csc|ln|log|exp|arcsin|arccos|arctan)"
            r"(?![A-Za-z])",
            r"\\\1 ",
        ),
    ]
]  # fmt: skip
_WRAPPER = re.compile(
    r"\\(?:boldsymbol|bm|mathbf|mathit|mathcal|displaystyle|boxed|fbox|emph|underline)\s*\{"
)
_ROOT = re.compile(r"(?:[√∛∜]|(?<![\\A-Za-z])(?:sqrt|cbrt))\s*")
_INDEX = {"∛": "[3]", "∜": "[4]", "c": "[3]"}
_RADICAND = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]|\\pi")
_OVER = re.compile(r"\\(over|choose)(?![A-Za-z])")
_FOR_INTEGERS = re.compile(
    r"(?<=\S),?\s*\(?\s*(?:\\text\{\s*(?:where|for|with)(?: all| any| some)?\s*\})?\s*([kmn])\s*"
    r"\\in\s*(?:\\mathbb\{Z\}|\\text\{\s*integers?\s*\})\s*\)?$"
)
_LEAD = re.compile(
    r"(?:####|(?:\\text\s*\{\s*)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*:?\s*\}?"
    r"|答案\s*[:是为]*|等于|故?选\s*:?(?=\s*\(?[A-Z]\b)|\\(?:therefore|boxed)(?![A-Za-z]))\s*",
    re.IGNORECASE,
)
_SIGN = re.compile(r"(?:\\approx(?![A-Za-z])|=(?!=)|\+(?=[\d\\.]))\s*")
_TEXT_WITHOUT_WORDS = re.compile(
    r"\\text\s*\{((?:[^{}A-Za-z]|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))+)\}"
)
_NUMBER_IN_TEXT = re.compile(r"\\text\s*\{\s*([+-]?\d[\d.,]*)(?![\d.,])\s*([^{}\d]+)\}")


def canonical(text: str) -> str:
    r"""The same answer in LaTeX without sizes, fonts, colors and Unicode: `２√５` is `2\sqrt{5}`.

    Raises ValueError for brackets nested deeper than MAX_NESTING.
    """
    text = _FRACTIONS.sub(_fraction, re.sub(r"[ \t\r\n\f\v]+", " ", text))
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("(?:\\d[\u0304\u0305])+", _overline, text)
    text = re.sub("[₀-₉]+", lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", text)
    text = "".join(_CHARACTERS.get(character, character) for character in text)
    thin = "\N{THIN SPACE}"
    text = thin.join(unicodedata.normalize("NFKC", part) for part in text.split(thin))
    text = text.replace(r"\\", ROW)
    if r"\begin" not in text:  # no columns of a matrix
        text = re.sub(r"\\?&", " and ", text)
    if _nesting(text) > MAX_NESTING:
        raise ValueError(f"brackets nested more than {MAX_NESTING} deep")
    text = digits_of_chinese(text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = _for_integers(written_numbers(text))
    text = _quotients(_brace_roots(_unwrap(text)))
    text = _trim(re.sub(r"\s+", " ", text.replace(thin, "")).strip())
    if whole := _TEXT_WITHOUT_WORDS.fullmatch(text):
        return _trim(whole[1])
    return _NUMBER_IN_TEXT.sub(r"\1\\text{ \2}", text) if text.startswith(r"\text") else text


def _for_integers(text: str) -> str:
    r"""`2n\pi, n \in \mathbb{Z}` as `2k\pi`."""
    found = _FOR_INTEGERS.search(text)
    if found is None:
        return text
    return re.sub(rf"(?<![A-Za-z]){found[1]}(?![A-Za-z])", "k", text[: found.start()])


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest


def _fraction(found: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", found[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _overline(found: re.Match[str]) -> str:
    return rf"\overline{{{re.sub(r'[^0-9]', '', found[0])}}}"


def _trim(text: str) -> str:
    """Without `$` around it, a final full stop and words such as "the answer is" in front."""
    text = _plain(text)
    for pattern in (_LEAD, _SIGN):
        if found := pattern.match(text):
            text = _plain(text[found.end() :])
    return text


def _plain(text: str) -> str:
    text = text.strip().rstrip(".,; ")
    if text.count('"') == 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return text.strip("$").strip().rstrip(".,; ") if re.fullmatch(r"\$.*[^\\]\$", text) else text


def closing(text: str, start: int) -> int | None:
    """Index of the bracket, of any kind, that closes the one before `start`; None if none does."""
    depth, index = 1, start
    while index < len(text):
        character = text[index]
        if character in "{([":
            depth += 1
        elif character in "})]":
            depth -= 1
        if depth == 0:
            return index
        index += 1
    return None


def split_top(text: str, mark: str) -> list[str]:
    """`text` cut at each `mark` outside of brackets; `[` may close with `)`, as in intervals."""
    depth, cuts = 0, [-1]
    for index, character in enumerate(text):
        if character in "{([":
            depth += 1
        elif character in "})]":
            depth -= 1
        elif character == mark and depth == 0:
            cuts.append(index)
    cuts.append(len(text))
    return [text[first + 1 : last] for first, last in pairwise(cuts)]


def without_braces(text: str) -> str:
    """`text` without braces around all of it."""
    while text.startswith("{") and closing(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _unwrap(text: str) -> str:
    r"""Drop font commands and keep their content: `\mathbf{\frac{1}{2}}` is `\frac{1}{2}`."""
    for _ in range(8):
        found = _WRAPPER.search(text)
        end = closing(text, found.end()) if found else None
        if found is None or end is None:
            return text
        text = text[: found.start()] + text[found.end() : end] + text[end + 1 :]
    return text


def _brace_roots(text: str) -> str:
    r"""Plain roots as LaTeX: `sqrt(3)`, `√3` and `√(x+1)` are `\sqrt{3}` and `\sqrt{x+1}`."""
    parts, position = [], 0
    for found in _ROOT.finditer(text):
        if found.start() < position:
            continue
        start = found.end()
        end = closing(text, start + 1) if text[start : start + 1] in ("(", "{") else None
        if end is not None:
            content, after = _brace_roots(text[start + 1 : end]), end + 1
        else:
            plain = _RADICAND.match(text, start)
            content, after = (plain[0], plain.end()) if plain else ("", start)
        root = rf"\sqrt{_INDEX.get(found[0][0], '')}{{{content}}}" if content else found[0]
        parts += [text[position : found.start()], root]
        position = after
    return "".join(parts) + text[position:]


def _quotients(text: str) -> str:
    r"""`{a \over b}` as `\frac{a}{b}`, `{a \choose b}` as `\binom{a}{b}`."""
    for _ in range(8):
        found = _OVER.search(text)
        if found is None:
            break
        start, depth = found.start(), 0
        while start > 0 and (depth > 0 or text[start - 1] not in "{(["):
            start -= 1
            depth += (text[start] in "})]") - (text[start] in "{([")
        end = closing(text, found.end())
        end = len(text) if end is None else end
        top, bottom = text[start : found.start()].strip(), text[found.end() : end].strip()
        command = r"\frac" if found[1] == "over" else r"\binom"
        text = rf"{text[:start]}{command}{{{top}}}{{{bottom}}}{text[end:]}"
    return text
