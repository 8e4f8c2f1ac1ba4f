"""Templates that stand for words, and those that stand for nothing."""

from __future__ import annotations

import pytest

from attention_rl_trainer.memories.articles.markup import plain_text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{convert|5|km|mi}}", "5 km"),
        ("{{convert|5|to|6|km|mi|abbr=on}}", "5 to 6 km"),
        ("{{cvt|5|-|6|kg}}", "5–6 kg"),
        ("{{lang|fr|une ''maison''}}", "une maison"),
        ("{{lang-de|Haus}}", "Haus"),
        ("{{Nowrap|[[a|b]] c}}", "b c"),
        ("a{{ndash}}b", "a–b"),
        ("it{{'s}}", "it's"),
        ("{{frac|1|2}} {{frac|3|1|2}} {{frac|4}}", "1/2 3 1/2 1/4"),
        ("{{val|1.5|e=6|u=m}} {{val|7}}", "1.5 × 10^6 m 7"),
        ("{{As of|2015|3}}", "As of 2015-03"),
        ("{{start_date|1969|7|16}}", "1969-07-16"),
        ("{{circa|1900}}", "c. 1900"),
        ("{{USS|Hornet|CV-12}}", "USS Hornet"),
        ("{{ship|HMS|Beagle||2}}", "HMS Beagle"),
        ("{{chem|H|2|O}}", "H2O"),
        ("10{{sup|6}}", "10^6"),
        ("{{quote|text=Veni.}}", "Veni."),
        ("{{math|x}} {{unknown|x}}.", "x."),
        ("{{convert|5|ft|10|in|cm}}", "5 ft 10 in"),
        ("{{convert|10|x|5|x|3|cm}}", "10 by 5 by 3 cm"),
        ("{{convert|1|yd|2|ft|3|in|m}} {{convert|11|st|4|lb|kg|0}}", "1 yd 2 ft 3 in 11 st 4 lb"),
        ("{{convert|5|km|2}} {{convert|5|km|mi|2}} {{convert|6|ft|2|in|m|2}}", "5 km 5 km 6 ft 2 in"),
        ("{{convert|60|and(-)|80|kg}}, {{convert|1|,|2|, and|3|m}}", "60 and 80 kg, 1, 2, and 3 m"),
        ("{{convert|5+1/2|in}}, {{convert|3//4|mi}}, {{convert|5{{frac|1|2}}|ft}}", "5 1/2 in, 3/4 mi, 5 1/2 ft"),
        ("{{convert|10|ft|m|adj=mid|-long}} and {{convert|3|mi|km|adj=pre|long}}", "10 ft-long and 3 long mi"),
        ("{{convert|5|$/mi|$/km}}, {{convert|1e3|m}}, {{cvt|-40|C|F}}", "$5/mi, 1 × 10^3 m, -40 °C"),
        ("{{convert|20|+/-|2|C|F}} {{convert|1|sqmi|km2}} {{convert|1,200|USgal|l}}", "20 ± 2 °C 1 sq mi 1,200 US gal"),
        ("It is {{convert|5|km|mi|disp=out}} long.", "It is long."),
        ("{{height|ft=5|in=10}}, {{track gauge|1435mm}}, {{hands|15.2}}", "5 ft 10 in, 1435 mm, 15.2 hands"),
        ("{{formatnum:18}} {{formatnum: 3003}} {{formatnum:1234567.5}}", "18 3,003 1,234,567.5"),
        ("{{formatnum:1,234|R}} {{lc:ABC}} {{ucfirst:abc}} {{UC:a}}", "1234 abc Abc A"),
        ("{{langx|de|Haus}}, {{lang-zh|c=中文|p=Zhōngwén}}", "Haus, 中文; Zhōngwén"),
        ("{{US$|5 million}}, {{GBP|3}}, {{€|7}}, {{INRConvert|5|c}}", "US$5 million, £3, €7, ₹5 crore"),
        ("a {{sic}}, {{sic|teh}}, {{sic|wo|rd}}, {{sic|hide=y|teh}}", "a [sic], teh [sic], word [sic], teh"),
        ("{{val|1.5|0.1|u=m}}, {{val|5|+1|-2}}, {{val|1.5(2)e6}}", "1.5±0.1 m, 5+1−2, 1.5(2) × 10^6"),
        ("5{{frac|1|2}} and {{frac|1|2}}", "5 1/2 and 1/2"),
        (
            "{{As of|2015|March|lc=y}}, {{as of|2013|6|8}}, {{as of|9|alt=by 9}}",
            "as of March 2015, As of 2013-06-08, by 9",
        ),
        ("{{nihongo|Tokyo|東京|Tōkyō}}, {{ill|Ada|de|Eda|lt=Ida}}", "Tokyo (東京, Tōkyō), Ida"),
        ("{{HMS|Ajax|22|6}}, {{sclass|Nimitz|aircraft carrier}}", "HMS Ajax, Nimitz-class aircraft carrier"),
        ("{{hlist|a|b}} {{key press|Ctrl|C}} {{linktext|北|京}}", "a · b Ctrl+C 北京"),
        ("{{angbr|th}} {{abs|x}} {{mset|1, 2}} {{tlx|foo}} {{(}}a{{)}} {{!}}", "⟨th⟩ |x| {1, 2} {{foo}} {a} |"),
        ("{{ordinal|3}}, {{ord|12}}, {{c.|1900|1910}}, {{reign|1|2}}", "3rd, 12th, c. 1900 – c. 1910, r. 1–2"),
        ("{{OldStyleDate|13 May|1712|2 May}}, {{start date|7 May 1712}}", "13 May [O.S. 2 May] 1712, 7 May 1712"),
        ("{{color|red|a}} {{font color|red|white|b}} {{resize|90%|c}}", "a b c"),
        ("A{{br}}B {{Template:nowrap|c}} {{music|flat}} 3{{e|6}}", "A\nB c ♭ 3 × 10^6"),
        ("He said:{{quote|Veni.}}Then he left.", "He said:\nVeni.\nThen he left."),
        ("It is so: {{ubl|one|two}}", "It is so:\none\ntwo"),
        ("{{harvtxt|Smith|Roe|1990}} and {{bibleverse|Mark|3:25}}", "Smith & Roe (1990) and Mark 3:25"),
        ("{{IPAc-en|a}}{{ESP}}{{angbr|{{IPA|a}}}}x", "x"),
    ],
)
def test_a_template_that_stands_for_words_is_replaced_by_them(template: str, words: str) -> None:
    assert plain_text(template) == words
