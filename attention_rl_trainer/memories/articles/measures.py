"""From a template that prints a number to what it prints: measures, values, fractions, dates, sums of money.

A measure is printed as it was entered, all of it, and not what it is converted to. A function returns None where what
the template prints is not among its arguments.
"""

from __future__ import annotations

import re

from attention_rl_trainer.memories.articles.arguments import Arguments
from attention_rl_trainer.memories.articles.literal import APART

RANGE_WORDS = {
    "-": "–", "–": "–", "to": "to", "to(-)": "to", "to about": "to about", "and": "and", "and(-)": "and",
    ", and": ", and", "or": "or", "or(-)": "or", ", or": ", or", "by": "by", "by(x)": "by", "x": "by", "*": "by",
    "×": "by", "xx": "×", "+": "+", "plus": "+", "±": "±", "+/-": "±", "&": "&", "/": "/", ",": ",", ";": ";",
}  # fmt: skip
"""What may stand between two numbers of a measure, and how it is printed."""

_UNITS = {
    "C": "°C", "F": "°F", "C-change": "°C", "F-change": "°F", "R": "°R", "sqmi": "sq mi", "sqft": "sq ft",
    "sqyd": "sq yd", "sqin": "sq in", "sqnmi": "sq nmi", "sqkm": "km2", "sqm": "m2", "cuft": "cu ft", "cuin": "cu in",
    "cumi": "cu mi", "cuyd": "cu yd", "usgal": "US gal", "USgal": "US gal", "U.S.gal": "US gal", "impgal": "imp gal",
    "USoz": "US fl oz", "USfloz": "US fl oz", "impoz": "imp fl oz", "impfloz": "imp fl oz", "LT": "long tons",
    "ST": "short tons", "MT": "t", "long ton": "long tons", "short ton": "short tons", "lbf.ft": "lbf⋅ft",
    "lbft": "lbf⋅ft", "N.m": "N⋅m", "Nm": "N⋅m",
}  # fmt: skip
"""Units that are written in another way than their codes."""

_DIGIT = r"\d\u00bc-\u00be\u2150-\u215e"
_NUMBER = rf"(?:[{_DIGIT}][,.{_DIGIT}]*(?:e[-+−]?\d+)?|\.\d+)(?:\(\d+\))?(?:/{{1,2}}\d+)?"
_VALUE = re.compile(rf"[-+−~±]?{_NUMBER}(?:[ +−-]\d+/{{1,2}}\d+)?", re.IGNORECASE)
_EXPONENT = re.compile(r"(?<=[\d.)])e([-+−]?\d+)$", re.IGNORECASE)
_MONEY_UNIT = re.compile(r"([A-Z]{0,3}[$£€¥₹₩])(/.+)?")
_ONLY_CONVERTED = frozenset({"number", "out", "output number only", "output only", "table", "tablecen"})


def measure(arguments: Arguments) -> str | None:
    """Print {{convert|5|ft|10|in|cm}} as 5 ft 10 in: all that is converted, without the conversion."""
    words = [word.replace(APART, " ").strip() for word in arguments.positional()]
    display = arguments.get("disp")
    if display in _ONLY_CONVERTED:
        return None
    printed, num_read = _input_of_measure(words)
    if not printed:
        return " ".join(words[:2])
    if display == "unit":
        return printed[-1]
    # The word that {{convert|10|ft|m|adj=mid|-long}} puts beside the unit is the last one.
    extra = words[-1] if len(words) > num_read and not _VALUE.fullmatch(words[-1]) else ""
    match arguments.get("adj") if extra else "":
        case "mid":
            printed[-1] += extra if extra.startswith("-") else f" {extra}"
        case "pre":
            printed.insert(-1, extra)
    text = " ".join(printed)
    return re.sub(r" (?=[,;])", "", re.sub(r" ([–/]) ", r"\1", text))


def _input_of_measure(words: list[str]) -> tuple[list[str], int]:
    """Read numbers, what stands between them and their units, up to the first unit to convert to.

    Returns:
        What is printed, and how many arguments were read.
    """
    printed: list[str] = []
    number = 0
    while _is_value(words, number):
        printed.append(_value_of_measure(words[number]))
        number += 1
        if words[number : number + 1] and not _is_range(words, number) and not _is_value(words, number):
            _add_unit(printed, words[number])
            number += 1
        if _is_range(words, number):
            printed.append(RANGE_WORDS[words[number]])
            number += 1
        elif not (_is_value(words, number) and _is_unit(words, number + 1)):
            # A number alone says how exact the conversion is.
            break
    return printed, number


def _is_value(words: list[str], number: int) -> bool:
    return number < len(words) and _VALUE.fullmatch(words[number]) is not None


def _is_range(words: list[str], number: int) -> bool:
    return number < len(words) and words[number] in RANGE_WORDS and _is_value(words, number + 1)


def _is_unit(words: list[str], number: int) -> bool:
    return number < len(words) and words[number] != "" and not _is_value(words, number)


def _value_of_measure(word: str) -> str:
    word = word.replace("//", "/")
    if "/" in word:
        return re.sub(r"(?<=\d)[+](?=\d)", " ", word)
    return _with_power(word)


def _add_unit(printed: list[str], code: str) -> None:
    if money := _MONEY_UNIT.fullmatch(code):
        printed[-1] = f"{money[1]}{printed[-1]}{money[2] or ''}"
    elif code:
        printed.append(_UNITS.get(code, code))


def _with_power(number: str) -> str:
    return _EXPONENT.sub(lambda found: f" × 10^{found[1].lstrip('+')}", number)


def height(arguments: Arguments) -> str | None:
    """Print {{height|ft=5|in=10}} as 5 ft 10 in."""
    units = {"m": "m", "cm": "cm", "ft": "ft", "in": "in", "st": "st", "stlb": "st", "lb": "lb", "kg": "kg"}
    return " ".join(f"{arguments.get(name)} {unit}" for name, unit in units.items() if arguments.get(name)) or None


def gauge(arguments: Arguments) -> str | None:
    """Print {{track gauge|1435mm}} as 1435 mm, and {{track gauge|4ft8.5in}} as 4 ft 8.5 in."""
    pairs = re.findall(r"(\d[\d.]*)\s*(mm|cm|m|ft|in)", arguments.get(1))
    return " ".join(f"{number} {unit}" for number, unit in pairs) or None


def value(arguments: Arguments) -> str:
    """Print {{val|1.5|0.1|e=6|u=m/s}} as 1.5±0.1 × 10^6 m/s."""
    words = list(arguments.positional())
    number = words[0] if words else ""
    if len(words) > 2 and words[1] in RANGE_WORDS:
        number = re.sub(" ([–±/×]) ", r"\1", f"{number} {RANGE_WORDS[words[1]]} {words[2]}")
    elif len(words) > 2 and words[2]:
        number += f"+{words[1].lstrip('+')}−{words[2].lstrip('-−')}"
    elif len(words) > 1 and words[1]:
        number += f"±{words[1]}"
    number += arguments.get("end", "errend")
    exponent = arguments.get("e")
    number = f"{number} × 10^{exponent}" if exponent else _with_power(number)
    per = arguments.get("up", "upl")
    unit = arguments.get("u", "ul") + (f"/{per}" if per else "")
    separator = "" if unit in ("%", "°", "′", "″") else " "
    return f"{arguments.get('p')}{number}{arguments.get('s')}{separator}{unit}".strip()


def fraction(arguments: Arguments) -> str:
    """Print {{frac|1|2}} as 1/2 and {{frac|3|1|2}} as 3 1/2, apart from a digit before it."""
    parts = [part for part in arguments.positional() if part]
    if not parts:
        return ""
    if len(parts) == 3:
        return f"{APART}{parts[0]} {parts[1]}/{parts[2]}"
    return APART + "/".join(parts if len(parts) == 2 else ["1", *parts])


def date(arguments: Arguments) -> str:
    """Print {{start date|1969|7|16}} as 1969-07-16, and a date in words as it is."""
    parts = [part for part in arguments.positional() if part]
    if parts and parts[0].isdigit():
        numbers = [part for part in parts if part.isdigit()][:3]
        named = len(parts) > 1 and not parts[1].isdigit()
        return " ".join(reversed(parts[:3])) if named else "-".join(number.zfill(2) for number in numbers)
    return parts[0] if parts else ""


def as_of(arguments: Arguments) -> str:
    """Print {{as of|2015|3}} as "As of 2015-03"."""
    if alternative := arguments.get("alt"):
        return alternative
    if arguments.is_on("bare"):
        return date(arguments)
    words = "Since" if arguments.is_on("since") else "As of"
    return f"{words.lower() if arguments.is_on('lc') else words} {arguments.get('pre')} {date(arguments)}"


def old_style_date(arguments: Arguments) -> str:
    """Print {{OldStyleDate|13 May|1712|2 May}} as 13 May [O.S. 2 May] 1712."""
    new, year, old = [*arguments.positional(), "", "", ""][:3]
    return f"{new} [O.S. {old}] {year}" if old else f"{new} {year}"


def money(sign: str, arguments: Arguments) -> str:
    """Print {{US$|5 million}} as US$5 million."""
    amount = " ".join(part for part in (arguments.get(1), arguments.get("text")) if part)
    return f"{sign}{amount}"


def rupees(arguments: Arguments) -> str:
    """Print {{INRConvert|5|c}} as ₹5 crore."""
    words = {"k": "thousand", "l": "lakh", "m": "million", "c": "crore", "b": "billion", "lc": "lakh crore"}
    return f"₹{arguments.get(1)} {words.get(arguments.get(2), '')}".strip()


def gaps(arguments: Arguments) -> str:
    """Print {{gaps|1|234|567|u=m}} as 1234567 m."""
    power = f" × 10^{arguments.get('e')}" if arguments.get("e") else ""
    return f"{arguments.get('lhs')}{''.join(arguments.positional())}{power} {arguments.get('u')}".strip()


def nuclide(arguments: Arguments) -> str | None:
    """Print {{nuclide|einsteinium|254}} as einsteinium-254."""
    name, mass = arguments.get(1), arguments.get(2)
    return f"{name}-{mass}" if name and mass else name or None


def ordinal(arguments: Arguments) -> str | None:
    """Print {{ordinal|3}} as 3rd."""
    number = arguments.get(1)
    if not number.isdecimal():
        return number or None
    ending = "th" if number[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(number[-1], "th")
    return f"{number}{ending}"


def grouped(text: str, mode: str, is_english: bool) -> str:
    """Print {{formatnum:18000}} as 18,000; in languages other than English as it is entered.

    Args:
        mode: what stands after the number: "R" takes the groups away, "NOSEP" makes none.
    """
    number = re.fullmatch(r"([-−+]?)(\d+)((?:\.\d+)?)", text)
    if mode == "R":
        return text.replace(",", "")
    if number is None or mode == "NOSEP" or not is_english:
        return text
    return f"{number[1]}{int(number[2]):,}{number[3]}" if not number[2].startswith("0") else text
