"""Words and sentence patterns of the templates: everyday English with many sounds."""

import re

_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    " fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty"
    " ninety"
)
NUMBERS = _NUMBERS.split()

_NAMES = (
    "Anna Ben Carol David Emma Frank Grace Henry Irene Jack Kate Leo Mary Nora Oscar Paul Rachel"
    " Sam Tom Vera Walter Zoe Alice Martin Peter Julia George Helen Robert Susan"
)
_NOUNS = (
    "apple bag ball bank basket bed bell bird boat book bottle box bread bridge brush bus cake"
    " camera candle car card carpet castle cat chair cheese church clock cloud coat coin cup desk"
    " doctor dog door dress drum egg engine farmer fence field fire fish flag flower fork friend"
    " garden gate gift girl glass glove goat guitar hammer hat hill horse house island jacket jar"
    " judge key kitchen knife ladder lake lamp leaf letter library lion map market mirror moon"
    " mountain mouse nurse ocean office orange oven page paint paper park path pen phone photo"
    " piano picture pilot plane plant plate pocket police potato queen radio rain river road"
    " robot roof room rope rose salt sandwich school ship shirt shoe shop sister snake soup spoon"
    " stamp star station stone store storm story street student sugar sweater table teacher thing"
    " ticket tiger tower town toy train tree truck umbrella valley village violin voice wall"
    " watch water weather wheel window winter wolf yard zebra machine question answer computer"
    " program letter engineer bicycle"
)
_ADJECTIVES = (
    "old new big small red blue green yellow white black young happy sad quiet loud strange"
    " simple heavy light warm cold clean dirty empty full strong weak soft hard sharp smooth"
    " bright dark little large broken famous gentle golden hidden honest narrow wide perfect"
    " pretty proud quick rough round silver single sleepy special square tall thin tiny useful"
    " wooden wild wrong rich poor brave careful cheap clever curious early easy fair fresh"
    " friendly huge lovely lucky"
)
_PAST = (
    "found lost saw bought sold took left kept made broke moved cleaned painted opened closed"
    " watched carried followed wanted needed liked loved hated chose drew fixed forgot gave held"
    " hid knew noticed passed picked pulled pushed remembered reached sent shared showed stole"
    " threw touched used visited washed"
)
_PAST_OF = (
    "wrote about|talked about|thought about|looked at|waited for|paid for|asked for|dreamed of"
    "|worried about|listened to|spoke to|ran from|walked to"
)
_PLACES = (
    "in the kitchen|at the station|on the table|under the bridge|behind the house|near the river"
    "|by the window|in the garden|at school|on the roof|in the north|across the street"
    "|beside the road|between the trees|above the clouds|below the stairs|at the market"
    "|in the middle of the room|on the other side of town|in a small village|along the coast"
    "|inside the box|outside the door|at the end of the hall|over the mountains"
    "|through the forest"
)
_TIMES = (
    "yesterday|today|tomorrow|last night|this morning|every evening|on Monday|on Tuesday"
    "|on Wednesday|on Thursday|on Friday|on Saturday|on Sunday|in January|in February|in March"
    "|in April|in May|in June|in July|in August|in September|in October|in November|in December"
    "|before noon|after dinner|at midnight|once a week|a long time ago|two years later|right now"
    "|all day|for an hour|since the summer|before breakfast|during the storm"
)
_VERBS = (
    "find|lose|see|buy|sell|take|leave|keep|make|break|move|clean|paint|open|close|watch|carry"
    "|follow|need|like|love|choose|draw|fix|forget|give away|hold|hide|notice|pick up|pull|push"
    "|remember|reach|send|share|show|throw|touch|use|visit|wash|write about|talk about"
    "|think about|look at|wait for|pay for|ask for|dream of|worry about|listen to|speak to"
    "|run from|walk to"
)

# `<slot>` is filled from the list of that name, again and again until none is left.
TEMPLATES = {
    "name": _NAMES.split(),
    "noun": sorted(set(_NOUNS.split())),
    "adjective": _ADJECTIVES.split(),
    "past": [*_PAST.split(), *_PAST_OF.split("|")],
    "verb": _VERBS.split("|"),
    "place": _PLACES.split("|"),
    "time": _TIMES.split("|"),
    "number": NUMBERS[2:],
    "who": ["he", "she", "they", "we", "I", "<name>", "my father", "her mother", "the <noun>"],
    "the": ["the", "the <adjective>", "a <adjective>", "my", "your", "his", "her", "our", "this"],
    "sentence": [
        "<who> <past> <the> <noun> <place>.",
        "<who> <past> <the> <noun> <time>.",
        "<name> and <name> <past> <the> <noun> <place> <time>.",
        "did <name> <verb> <the> <noun> <time>?",
        "why would <who> <verb> <the> <noun>?",
        "where can I <verb> <the> <adjective> <noun>?",
        "please <verb> <the> <noun> <place>.",
        "do not <verb> <the> <adjective> <noun>, <name>.",
        "there were <number> <adjective> birds <place>.",
        "I have <number> reasons to <verb> <the> <noun>.",
        "the <adjective> <noun> was <adjective> and <adjective>.",
        "<the> <noun> is more <adjective> than <the> <noun>.",
        "if <name> can <verb> it, we can <verb> <the> <noun>.",
        "<time>, <who> <past> <the> <noun> and <past> <the> <adjective> <noun>.",
        "it was <adjective> <place>, but <name> <past> <the> <noun>.",
        "what a <adjective> <noun> you have, <name>!",
        "<name> said that <the> <noun> would be ready <time>.",
        "nobody wants to <verb> <the> <noun> <time>.",
    ],
}


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"[a-z']+", text.lower()))


VOCABULARY = words_of(" ".join(value for values in TEMPLATES.values() for value in values))


def in_vocabulary(text: str) -> bool:
    """Whether every word of a text is one of the templates' vocabulary."""
    return words_of(text) <= VOCABULARY
