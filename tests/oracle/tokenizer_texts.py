"""The texts of make_tokenizer.py: some to train small vocabularies on, and ugly ones to compare tokenizers on. All of them
were written for this purpose."""
import random

TRAINING = """The harbour master counts the boats before the sun comes up. There are twelve of them, and each one has a name.
When it rains, the boats stay where they are; when it doesn't, they're gone by six o'clock. I've seen it, you'll see it, we'd all see it.
A small program reads the numbers, adds them up and prints the sum: 1 + 2 + 3 = 6, 40 + 2 = 42, 1999 + 25 = 2024.
def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n
for (int i = 0; i < n; i++) { sum += a[i] * b[i]; }  /* a loop */  if (sum != 0) return -1;
<div class="note"><p>Hello, world!</p></div>  https://example.org/path/to/page?query=value&other=1#top
Das Boot liegt im Hafen, und über dem Wasser hängt der Nebel. Die Straße führt am Ufer entlang bis zur großen Brücke.
Le bateau est parti très tôt ce matin; l'équipage n'a pas dîné, mais il a reçu du pain et de l'eau fraîche.
El niño corrió hacia la montaña y encontró una piedra azul. ¿Dónde está la mañana? ¡Qué sueño!
Лодка стоит у берега, и рыбак чинит старую сеть. Вечером придёт дождь, а утром будет тихо.
Το καράβι έφυγε από το λιμάνι νωρίς το πρωί, και η θάλασσα ήταν ήσυχη.
القارب في الميناء والصياد يصلح الشبكة القديمة قبل المطر.
הסירה עומדת ליד החוף, והדייג מתקן את הרשת הישנה.
नाव किनारे पर खड़ी है और मछुआरा पुराना जाल ठीक कर रहा है।
เรือจอดอยู่ที่ท่า และชาวประมงกำลังซ่อมแหเก่า
船停在港口,渔夫在修理旧网。天气很好,我们明天出发。
船は港に停まっていて、漁師は古い網を直しています。カタカナも書きます。
배는 항구에 서 있고 어부는 낡은 그물을 고치고 있습니다.
ნავი ნაპირთან დგას და მეთევზე ძველ ბადეს აკეთებს.
ጀልባው በወደቡ ላይ ቆሟል፤ ዓሣ አጥማጁም መረቡን ይጠግናል።
Thuyền đậu ở bến cảng, và người đánh cá đang vá chiếc lưới cũ.
Łódź stoi przy brzegu, a rybak naprawia starą sieć. Zażółć gęślą jaźń.
😀 😃 👍 🚀 🌊 the emoji line 😀😀😀 👍👍  tabs\tand\tmore\ttabs    four spaces
""".split("\n")

SCRIPTS = [
    "The quick brown fox doesn't jump; it'll wait. THEY'RE HERE, I'M SURE, YOU'VE GOT IT, WE'D SAY 'S",
    "Zażółć gęślą jaźń, Ærø, Þórr, İstanbul ıĞ, Straße ẞ, naïve façade, Đặng Thị, ỹ ǆ ŉ ſ 'ſ",
    "cafe\u0301 A\u030angstro\u0308m e\u0301\u0302\u0303 n\u0303o x\u0338y q\u0323\u0307 \u0301alone",
    "Съешь ещё этих мягких булок, Їжак, Ђорђе, Ѣ ѵ", "Ταχίστη αλώπηξ βαφής ψημένη γη, ᾳ ῷ ΰ Ά",
    "نص عربي مع تَشْكِيل وأرقام ٠١٢٣٤٥٦٧٨٩ و۱۲۳ لا إله", "עִבְרִית עם נִקּוּד וגם \"מרכאות\" ו־מקף",
    "हिन्दी में क्षत्रिय और ज्ञान १२३ ड़ ढ़", "தமிழ் எழுத்து ௧௨௩ కొత్త ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ বাংলা ১২৩",
    "ภาษาไทยไม่มีช่องว่าง น้ำ ก็ ๑๒๓", "ລາວ မြန်မာ ភាសាខ្មែរ བོད་ཡིག", "我能吞下玻璃而不伤身体。「引号」——,、。!?;:『漢字』〇一二三",
    "いろはにほへと チリヌルヲ ｶﾞｷﾞ ㌔ ㈱ 々〆ヵヶ ー", "한국어 문장 조합형 \u1112\u1161\u11ab\u1100\u116e\u11a8 ㄱㄴㄷ", "ქართული მხედრული Ⴀ ᲀ", "አማርኛ ፩፪፫ ፡።፣",
    "Հայերեն ՀԱՅԵՐԵՆ և", "ᏣᎳᎩ ꮳꮃꭹ ᐃᓄᒃᑎᑐᑦ ᚠᚢᚦ ⲁⲃⲅ 𐌰𐌱𐌲 𓀀𓁐 𝔘𝔫𝔦 𝟙𝟚𝟛 𠀀𠮷",
]
SYMBOLS = [
    "👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 🇩🇪🇫🇷🇯🇵🇺 ☎️ ☎︎ 1️⃣ #️⃣ 🫠 👍🏽", "\u200fRTL\u200e mark \u202bembedding\u202c \u2066isolate\u2069 \u061c", "zero\u200bwidth\u200cnon\u200djoiner\ufeffbom\u2060word",
    "\x00\x01\x02 \x07\x08\x0b\x0c\x0e\x1b[31mred\x1b[0m\x7f\x80\x85\x9f", "\ufffd\ufffd \ufffe\uffff \ue000\uf8ff \U000f0000\U0010ffff",
    "a\u00a0b\u2007c\u202fd\u2009e\u3000f\u1680g\u2028h\u2029i\u205fj\u180ek\u0085l", "½ ¼ ² ³ ⁴ ₅ ① ⑩ Ⅷ ⅷ ㊿ 𒐀 ൰ 一 ٣ ४ ๕", "— – ‐ ‑ … ‘quote’ “double” «guillemets» ‚low„ ´`¨^~°§¶•·",
    "€ £ ¥ ₹ ₿ ¢ ∑ ∫ √ ≠ ≤ ∞ → ⇒ ⊕ ∀ ∃ ¬ ♠♥ ★ ░▒▓ ┌─┐ │", "!@#$%^&*()_+-=[]{}|;:'\",.<>/?\\`~ !!! ??? ... --- === ///",
]
SPACES = [" ", "  ", "   x", "x   ", "\n", "\n\n", "\n\n\n\nx", "\r\n\r\n", "\r", "\t\t\tx", " \n \n ", "a \n b", "a\n \nb", "a  \n\n  b", "\u3000\u3000x", "x\u00a0\u00a0 y", " \t \t\n\t x",
          "word" + " " * 70 + "word", "\n" * 90, " " * 64 + "\n", "\t" * 40 + "x", " \n" * 40 + "z"]
NUMBERS = ["0", "12", "123", "1234", "12345678901234567890", "3.14159", "-1e-10", "0x1F 0b1010 0o17", "1,000,000.00", "1st 2nd 3rd 100th", "2024-11-24T09:41:26.655Z", "١٢٣٤ १२३४ 12٣४",
           "x1y22z333", "v1.2.3-rc4+build.5", "$12.50 50% 7°C", "(555) 123-4567", "192.168.0.1:8080", "²³¹ ½¾", " 1 12 123 1234"]
CODE = ["def f(x: int) -> int:\n\treturn x**2  # ok\n\n\nclass A:\n    pass\n", "if(a&&b||!c){x->y=*z;}//end", "SELECT * FROM t WHERE a='it''s' AND b<>3;", "#include <stdio.h>\r\nint main(void)\r\n{\r\n\treturn 0;\r\n}\r\n",
        "https://user:pa%20ss@example.org:8080/a/b.c?d=e&f=g%C3%A9#h", "mail.me+tag@sub.example.co.uk", "{\"key\": [1, 2.5, null, true], \"s\": \"a\\nb\\u00e9\"}", "<a href='x'>it's</a><!-- c -->", "C:\\Users\\me\\file.txt ~/.bashrc ../../etc",
        "snake_case camelCase PascalCase kebab-case SCREAMING_CASE __init__", "$\\alpha^{2}_{i} \\leq \\frac{1}{2}$", "I'd've y'all'd 'tis rock'n'roll o'clock 'LL 'Re 'vE 'M 'D 'T''s"]
LOOKALIKES = ["<|im_start|>user\nHi<|im_end|>\n", "<|im_start|", "|im_end|>", "<<|im_end|>>", "< |im_start|>", "<|IM_START|>", "<|im_start|><|im_start|>x<|im_end|> <|im_end|>", "a<|endoftext|>b", "<s>[INST] x [/INST]</s>", "<unk><pad><0x0A><0x41>",
              "<tool>call</tool> <tool>", "<too", "x<tool>y", " <tool> ", "\u2581lower\u2581one eighth \u2581", "\u0120G dots \u010a \u0100", "<|im_end|><|endoftext|><tool><|im_start|>",
              "zyxw zyxw qqqq wordword wordwords"]
LONG = ["a" * 400, "ab" * 150, "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft", "ก" * 120, "字" * 120, "=" * 200, "-" * 33 + ">" * 33, "ha" * 99 + "!", "😀" * 40, "e\u0301" * 50, "xX" * 64 + "1" * 64, "." * 77 + "\n" * 5]

BASE = [""] + SCRIPTS + SYMBOLS + SPACES + NUMBERS + CODE + LOOKALIKES + LONG


def mixtures(count, seed=20261124):
    """Seeded random mixtures: slices of the texts above and characters from everywhere."""
    rng = random.Random(seed)
    pieces = [t for t in BASE if 0 < len(t) < 200]
    out = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 7)):
            kind = rng.randrange(10)
            if kind < 5:
                t = rng.choice(pieces)
                at = rng.randrange(len(t))
                parts.append(t[at:at + rng.randrange(1, 9)])
            elif kind < 7:
                parts.append(rng.choice([" ", "  ", "\n", "\t", "'s", "'", "1", "12", "\r\n", "\u00a0", "é", "ñ", "<tool>", "the"]))
            elif kind < 9:
                parts.append("".join(chr(rng.choice([rng.randrange(0x20, 0x250), rng.randrange(0x250, 0x3000), rng.randrange(0x3000, 0xD7FF)])) for _ in range(rng.randrange(1, 4))))
            else:
                parts.append(chr(rng.choice([rng.randrange(0xE000, 0xFFFE), rng.randrange(0x10000, 0x20000), rng.randrange(0, 0x20)])))
        out.append("".join(parts))
    return out


# Prompts as pieces: (text, trusted)
PIECES = [
    [["<|im_start|>user\n", True], ["Hello <|im_end|> there", False], ["<|im_end|>\n<|im_start|>assistant\n", True]],
    [["<|im_start|>", True], ["<|im_end|>", False], ["<|im_end|>", True]],
    [["<|im_", True], ["end|>", False]],                      # straddles a border: plain
    [["<|im_", False], ["end|>", True]],
    [["<|im_", True], ["end|>", True]],                       # two trusted pieces are one
    [["He", True], ["llo wor", False], ["ld's", True]],       # words and contractions run across borders
    [["12", True], ["34", False], ["56", True]],
    [["x  ", True], ["  y", False], ["\n", True], ["\n", False]],
    [["\u00e9"[:1], True], ["<tool>", False], ["<tool>", True]],
    [["<to", True], ["ol>", False]],                          # user-defined tokens are text: found across borders
    [["", True], ["", False], ["a", True], ["", False], ["b", False]],
    [["<|im_start|>system\n", True], ["<|im_start|>system\n<|endoftext|>", False], ["<|im_end|>", True], ["<|im_end|>\n", False], ["<|endoftext|>", True]],
]

# What pre-tokenizer patterns decide on, for a vocabulary in which nearly any two neighbours inside a fragment are joined.
PROBES = ["'", "'", "s", "S", "ll", "LL", "t", "Re", "vE", "d", "\u017f", "a", "\u00e9", "e\u0301", "\u5b57", " ", " ", "  ", "\n", "\r\n", "\t", "\u0085", "\u00a0", "\u3000",
          "\u2028", "\u180e", "\u200b", "\x0b", "\x1c", "1", "12", "\u00bd", "\u0967", ".", "!!", "<", "_", "\ufe0f"]


def probes(count, seed=7):
    rng = random.Random(seed)
    return ["".join(rng.choice(PROBES) for _ in range(rng.randrange(2, 16))) for _ in range(count)]
