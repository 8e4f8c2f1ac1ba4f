"""What `twenty_questions.json` is built from: defaults of each category, and for each object what differs from them.

A line is ``name: differences``. ``+word`` answers the question of that short name with "yes", ``~word`` with
"sometimes", ``-word`` with "no"; what neither the category nor the object names is "no". A category's own line begins
with ``=``. Each answer is about the thing as it is met in everyday life, grown up and of the usual kind; "sometimes"
stands where usual ones differ.

    python tests/memories/twenty_questions_source.py    # writes the data set that the package ships
"""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = {
    "alive": "Is it a living thing?",
    "animal": "Is it an animal?",
    "plant": "Is it a plant or part of one?",
    "food": "Is it a food or a drink?",
    "made": "Is it made by people?",
    "bigger": "Is it bigger than a person?",
    "heavier": "Is it heavier than a car?",
    "pocket": "Does it fit in a pocket?",
    "home": "Is it often found in homes?",
    "kitchen": "Is it usually kept in a kitchen?",
    "outdoors": "Is it usually found outdoors?",
    "water": "Is it usually found in water?",
    "wood": "Is it mostly made of wood?",
    "metal": "Is it mostly made of metal?",
    "cloth": "Is it made of cloth?",
    "soft": "Is it soft?",
    "sharp": "Is it sharp or prickly?",
    "round": "Is it round?",
    "green": "Is it usually green?",
    "white": "Is it usually white?",
    "wheels": "Does it have wheels?",
    "travel": "Do people travel in or on it?",
    "inside": "Can people go inside it?",
    "fly": "Can it fly?",
    "legs": "Does it have four legs?",
    "eggs": "Does it lay eggs?",
    "grow": "Does it grow?",
    "sweet": "Does it taste sweet?",
    "noise": "Does it usually make a sound?",
    "electric": "Does it run on electricity?",
    "worn": "Do people wear it?",
    "sport": "Is it used in a sport?",
    "handle": "Do you hold it by a handle?",
    "store": "Do people keep things in it?",
    "children": "Is it mainly for children?",
    "cost": "Does it usually cost more than a bicycle?",
}

TABLE = """
= mammal: +alive +animal +outdoors +legs +grow
dog: +home ~outdoors ~soft +noise ~sport ~cost
cat: +home ~outdoors +soft +noise
horse: +bigger +travel ~noise +sport +cost
cow: +bigger +noise +cost
pig: ~bigger +noise ~cost
sheep: +soft +white +noise ~cost
goat: +noise ~cost
donkey: +bigger +travel +noise ~cost
rabbit: ~home ~outdoors +soft
hamster: +pocket +home -outdoors +soft
mouse: +pocket ~home ~outdoors +soft ~noise
squirrel: ~soft
hedgehog: +sharp
fox: ~soft ~noise
wolf: ~soft +noise
bear: +bigger ~soft ~noise
polar bear: +bigger ~water ~soft +white ~noise
lion: +bigger ~soft +noise
elephant: +bigger +heavier ~travel +noise
giraffe: +bigger ~heavier
camel: +bigger +travel ~noise ~sport +cost
monkey: ~soft ~legs +noise
kangaroo: ~bigger ~soft ~legs
bat: ~pocket ~soft +fly -legs ~noise
zebra: +bigger ~noise
hippopotamus: +bigger ~heavier +water ~noise
otter: +water +soft ~noise
beaver: +water +soft

= bird: +alive +animal +outdoors ~soft +fly +eggs +grow +noise
hen: ~white ~fly
rooster: ~fly -eggs
duck: +water
goose: ~water ~white
swan: +water +white ~noise
penguin: ~water -fly
ostrich: +bigger -fly -noise
owl:
eagle: ~noise
parrot: ~home ~outdoors ~green ~cost
sparrow: +pocket
pigeon: ~sport
seagull: ~water +white
peacock: ~green -eggs
canary: +pocket +home -outdoors
flamingo: +water ~noise
hummingbird: +pocket ~noise

= sea animal: +alive +animal +outdoors +water +eggs +grow
salmon: ~food
tuna: ~food ~bigger
goldfish: +pocket +home -outdoors
shark: ~bigger ~heavier ~eggs
whale: +bigger +heavier -eggs +noise
dolphin: +bigger -eggs +noise
seal: ~bigger ~water -eggs +noise
octopus: ~food +soft
jellyfish: +soft ~eggs
crab: ~food ~water
shrimp: ~food +pocket
starfish: ~pocket ~eggs
sea urchin: ~food ~pocket +sharp +round ~eggs
sea turtle: ~bigger ~green
stingray: ~bigger ~sharp -eggs
walrus: +bigger ~water -eggs +noise

= small animal: +alive +animal +pocket +outdoors +eggs +grow
bee: +fly +noise
butterfly: +fly
moth: ~home +fly
housefly: +home ~outdoors +fly +noise
mosquito: ~home +fly +noise
ladybug: +round +fly
ant: ~home ~fly
beetle: ~fly
spider: +home ~outdoors
grasshopper: +green ~fly +noise
dragonfly: ~water +fly
earthworm: +soft
snail: ~food ~soft ~round
caterpillar: +soft ~green -eggs
frog: ~water ~green +legs +noise
lizard: ~pocket ~green +legs ~eggs
snake: ~bigger -pocket ~eggs ~noise
crocodile: +bigger -pocket +water ~green +legs
tortoise: -pocket ~round +legs
scorpion: ~sharp -eggs

= plant: +alive +plant +outdoors +grow
oak tree: +bigger +heavier +wood ~green
pine tree: +bigger +heavier +wood +sharp +green
palm tree: +bigger ~heavier ~wood +green
apple tree: +bigger +wood ~green
birch tree: +bigger ~heavier +wood ~green ~white
rose: ~home ~soft +sharp
tulip: ~home ~soft
sunflower: ~bigger +round
daisy: +pocket ~soft +white
dandelion: +pocket ~soft ~round
grass: +soft +green ~sport
moss: +soft +green
fern: ~home +green
ivy: ~bigger ~home +green
cactus: ~bigger ~home +sharp +green
bamboo: +bigger ~wood +green
nettle: +sharp +green
water lily: +water ~round ~green ~white
wheat: ~food ~green
clover: +pocket +green
hedge: ~bigger +green
holly: ~home +sharp +green
thistle: +sharp ~green
thorn: ~alive +pocket +sharp
log: -alive ~bigger ~home +wood -grow
leaf: ~alive +pocket ~soft +green
acorn: ~alive +pocket ~round
pine cone: -alive ~pocket ~home ~wood +sharp

= fruit: ~alive +plant +food +home +kitchen +grow +sweet
apple: ~pocket +round ~green
orange: ~pocket +round
lemon: +pocket ~round -sweet
lime: +pocket +round +green -sweet
banana: ~pocket +soft
pear: ~pocket ~soft ~green
peach: ~pocket +soft +round
plum: +pocket +soft +round
cherry: +pocket ~soft +round
grape: +pocket ~soft +round ~green
strawberry: +pocket +soft
raspberry: +pocket +soft ~round
watermelon: +round +green
pineapple: +sharp
coconut: ~home ~kitchen +round ~sweet
kiwi fruit: +pocket ~soft ~round ~green
mango: ~pocket ~soft ~round ~green
avocado: ~pocket ~soft +green -sweet
olive: +pocket ~soft ~round ~green -sweet

= vegetable: ~alive +plant +food +home +kitchen +grow
carrot: ~pocket ~sweet
potato: ~pocket ~round
onion: ~pocket +round ~white
garlic: +pocket ~round +white
tomato: ~pocket ~soft +round ~sweet
cucumber: +green
lettuce: ~soft ~round +green
cabbage: +round +green
cauliflower: ~round +white
spinach: +soft +green
pea: +pocket +round +green ~sweet
green bean: +pocket +green
corn: +sweet
pumpkin: ~home ~kitchen ~outdoors +round ~sweet
bell pepper: ~pocket ~green ~sweet
chili pepper: +pocket ~green
mushroom: -plant +pocket ~outdoors +soft ~round ~white
beetroot: ~pocket +round ~sweet
radish: +pocket +round
leek: ~green ~white
eggplant: ~soft
broccoli: ~round +green
asparagus: ~pocket +green
artichoke: ~sharp ~round +green
peanut: +pocket

= food: +food +made +home +kitchen
bread: +soft ~round
cheese: ~soft ~round
butter: +soft
egg: -made +pocket ~round ~white
honey: -made +sweet
jam: +soft +sweet
sugar: +white +sweet
salt: ~made +white
rice: +plant -made +white +grow
flour: +soft +white
spaghetti: ~soft
pizza: ~kitchen ~soft +round
soup:
cake: +soft ~round +sweet
cookie: +pocket +round +sweet
chocolate bar: +pocket +sweet
ice cream: +soft ~white +sweet
sausage: ~pocket ~soft
hamburger: ~kitchen +soft +round
sandwich: ~pocket +soft
pancake: +soft +round ~sweet
doughnut: ~pocket ~kitchen +soft +round +sweet
popcorn: ~soft ~round +white ~sweet
lollipop: +pocket ~kitchen ~round +sweet ~handle +children
yogurt: +soft +white ~sweet
chewing gum: +pocket ~home ~kitchen +soft +sweet
milk: -made +white ~sweet
coffee: ~sweet
orange juice: +sweet

= clothing: +made +home +cloth +soft +worn
T-shirt: ~white ~sport
shirt: ~white
pants: ~store
sweater:
coat: ~outdoors ~store
wedding dress: -home +white +cost
sock: +pocket ~white ~sport
glove: +pocket ~outdoors ~cloth ~sport
shoe: ~outdoors ~cloth ~soft ~sport
boot: ~outdoors -cloth -soft
hat: ~outdoors ~cloth ~soft ~round
cap: ~outdoors ~sport
scarf: ~outdoors
tie: ~pocket
belt: ~pocket -cloth -soft
swimsuit: ~pocket ~outdoors ~water +sport
helmet: ~home ~outdoors -cloth -soft ~round ~sport
glasses: +pocket ~metal -cloth -soft ~round
sunglasses: +pocket ~outdoors ~metal -cloth -soft
ring: +pocket +metal -cloth -soft +round ~cost
necklace: +pocket ~metal -cloth -soft ~cost
wristwatch: +pocket ~metal -cloth -soft ~round ~noise ~electric ~cost
crown: -home +metal -cloth -soft +round +cost
apron: +kitchen ~soft ~white
bib: ~pocket ~kitchen +children
diaper: ~pocket ~cloth +white +children

= tool: +made +home +metal +handle
hammer: ~noise
saw: +sharp ~noise
ax: ~home ~outdoors +sharp ~noise
screwdriver: ~pocket ~sharp
electric drill: ~metal ~sharp +noise +electric
wrench: ~pocket ~handle
pliers: ~pocket
needle: +pocket +sharp -handle
thumbtack: +pocket ~metal +sharp -handle
scissors: ~pocket ~kitchen +sharp
shovel: ~home +outdoors
rake: ~home +outdoors ~metal ~sharp
broom: ~kitchen ~wood -metal
bucket: ~outdoors ~metal ~round ~store
ladder: ~bigger ~home ~outdoors ~wood ~metal ~legs -handle
wheelbarrow: ~home +outdoors +wheels ~store
lawn mower: ~home +outdoors ~sharp +wheels +noise ~electric ~cost
flashlight: ~pocket ~metal +electric ~handle
tape measure: +pocket ~metal ~round -handle
rope: ~home ~outdoors -metal ~soft ~sport -handle
paintbrush: ~pocket ~wood -metal ~soft
magnifying glass: ~pocket -metal +round
chainsaw: -home +outdoors ~metal +sharp +noise ~electric ~cost
watering can: ~outdoors ~metal ~store
toolbox: ~metal +store

= kitchenware: +made +home +kitchen
spoon: +pocket ~metal +handle
fork: +pocket +metal ~sharp +handle
kitchen knife: +metal +sharp +handle
frying pan: +metal +round +handle
saucepan: +metal +round +handle ~store
plate: +round ~white
bowl: +round ~white ~store
mug: ~round ~white +handle
drinking glass: ~round
bottle: ~pocket ~round +store
jar: ~round +store
kettle: ~metal ~round +noise ~electric +handle
teapot: ~metal ~round ~white +handle
rolling pin: +wood ~round +handle
cutting board: ~wood
corkscrew: +pocket +metal +sharp +handle
sieve: ~metal ~round +handle
tin can: +metal ~round +store
chopsticks: ~pocket ~wood
whisk: +metal +handle
grater: +metal +sharp ~handle
baby bottle: ~white +children
lunch box: ~metal +handle +store ~children

= appliance: +made +home +electric
refrigerator: ~bigger +kitchen ~metal ~white ~noise +store +cost
oven: +kitchen +metal ~electric +cost
microwave oven: +kitchen ~metal ~white +noise
dishwasher: +kitchen ~metal ~white +noise +cost
washing machine: ~kitchen ~metal +white +noise +cost
toaster: +kitchen ~metal
blender: +kitchen ~sharp +noise
coffee machine: +kitchen ~metal +noise ~cost
vacuum cleaner: +wheels +noise +handle
clothes iron: ~metal +handle
hair dryer: +noise +handle
electric fan: ~round +noise
lamp: ~metal ~white
light bulb: +pocket ~round ~white
television: +noise ~cost
radio: ~pocket +noise
cell phone: +pocket +noise ~cost
laptop: ~metal ~noise +cost
camera: ~pocket ~noise ~cost
alarm clock: ~pocket ~round +noise ~electric
printer: ~white +noise
sewing machine: ~metal ~sharp +noise ~electric ~cost
electric shaver: +pocket ~sharp +noise
headphones: ~pocket +noise +worn
game console: ~noise ~children ~cost

= furniture: +made +home +wood
table: ~bigger ~kitchen ~round +legs ~cost
chair: ~kitchen ~wood ~metal +legs
armchair: -wood ~cloth +soft ~legs ~cost
sofa: +bigger -wood ~cloth +soft ~legs +cost
bed: +bigger ~wood ~metal +soft +legs +cost
crib: +legs +children ~cost
high chair: ~kitchen ~wood +legs +children
wardrobe: +bigger ~inside +store ~cost
chest of drawers: ~legs +store
bookcase: ~bigger +store
shelf: ~wood ~metal ~store
kitchen cabinet: +kitchen ~white +store ~cost
desk: ~bigger +legs ~store ~cost
stool: ~kitchen ~wood ~metal ~round ~legs
park bench: ~bigger -home +outdoors ~wood ~metal ~legs ~cost
mirror: -wood ~round
carpet: ~bigger -wood +cloth +soft ~cost
curtain: ~bigger -wood +cloth +soft
mattress: +bigger -wood ~cloth +soft ~white ~cost
pillow: -wood +cloth +soft ~white
blanket: -wood +cloth +soft
door: ~bigger ~white ~handle
bathtub: +bigger -wood ~metal +white ~inside ~cost
toilet: -wood +white ~noise
sink: ~kitchen -wood ~metal ~round ~white
hammock: ~bigger ~home +outdoors -wood ~cloth +soft

= vehicle: +made +bigger +outdoors +metal +wheels +travel +inside +noise +cost
car: ~electric ~sport ~store
race car: +sport
bus: +heavier ~electric
truck: +heavier +store
steam train: +heavier
tram: +heavier +electric
bicycle: ~bigger ~home -inside -noise ~electric +sport -cost
tricycle: -bigger ~home -inside -noise +children -cost
motorcycle: -inside ~sport
scooter: -bigger ~home -inside -noise ~electric ~children -cost
tractor: +heavier ~green ~travel ~inside
ambulance: +heavier ~white
fire engine: +heavier ~store
airplane: +heavier ~white +fly
helicopter: ~heavier ~wheels +fly
hot-air balloon: -metal +cloth +round -wheels ~inside +fly ~noise ~sport
rocket: +heavier ~white -wheels ~travel ~inside +fly
glider: -metal +white +fly -noise +sport
sailboat: ~heavier +water ~wood -metal ~white -wheels ~inside -noise +sport
rowboat: +water ~wood -metal -wheels -inside -noise ~sport
canoe: +water ~wood -metal -wheels -inside -noise +sport ~cost
ship: +heavier +water -wheels ~store
submarine: +heavier +water -wheels ~noise ~electric
sled: -bigger ~home ~wood -metal -wheels -inside -noise ~sport ~children -cost
horse carriage: +wood -metal ~inside ~noise
camper van: +heavier ~white ~store
stroller: -bigger ~home ~metal ~cloth ~travel -inside -noise +handle +children ~cost
wheelchair: -bigger ~home ~outdoors -inside -noise ~electric ~sport ~handle ~cost

= building: +made +bigger +heavier +outdoors +inside +cost
house: ~wood ~white +store
church: ~noise
castle:
lighthouse: ~round ~white
bridge: ~wood ~metal ~travel -inside
school: ~noise +children
hospital: ~white
factory: ~metal +noise
museum: ~store
warehouse: ~metal +store
stadium: ~round ~noise +sport
swimming pool: ~outdoors ~inside ~noise +sport
barn: +wood +store
shed: ~heavier +wood +store ~cost
windmill: ~wood ~metal ~white ~noise
garage: ~home +store
tent: -heavier +cloth ~soft ~cost
igloo: ~heavier +round +white -cost
tree house: -heavier +wood +children ~cost
playground: -heavier ~metal -inside ~noise +children
tunnel: ~outdoors ~round ~travel
skyscraper: ~metal
train station: +noise
fountain: ~bigger ~heavier ~round -inside +noise ~cost
statue: ~bigger ~heavier ~outdoors ~metal -inside ~cost
road: +travel -inside ~noise
doghouse: -bigger -heavier +wood -inside -cost

= musical instrument: +made ~home +noise
piano: +bigger +wood ~wheels +cost
guitar: +wood ~electric ~cost
violin: +wood ~cost
cello: +wood +cost
double bass: +bigger -home +wood +cost
harp: ~bigger -home +wood +cost
drum: ~wood +round ~cost
tambourine: ~wood +round
cymbals: -home +metal +round ~cost
triangle: ~pocket +metal ~children
flute: ~wood ~metal ~cost
recorder: ~wood ~children
trumpet: +metal ~cost
saxophone: +metal +cost
clarinet: ~wood ~cost
harmonica: +pocket ~metal
accordion: ~cost
xylophone: ~wood ~metal ~children
bell: ~pocket ~outdoors +metal ~handle
whistle: +pocket ~outdoors ~metal +sport
maracas: ~wood +handle
church organ: +bigger +heavier -home ~wood ~metal ~electric +cost
rattle: ~pocket +home +handle +children
electric guitar: +wood +electric ~cost

= toy or sport: +made ~home
soccer ball: +outdoors +round ~white +sport
basketball: ~outdoors +round +sport
tennis ball: ~pocket ~outdoors ~soft +round ~green +sport
golf ball: +pocket +outdoors +round +white +sport
ping-pong ball: +pocket +round ~white +sport
bowling ball: -home +round +sport
tennis racket: ~outdoors ~metal +sport +handle
baseball bat: ~outdoors ~wood ~metal +sport +handle
golf club: +outdoors +metal +sport +handle
skis: +outdoors +travel ~worn +sport ~cost
skateboard: +outdoors +wood +wheels +travel ~noise +sport
roller skates: ~outdoors +wheels ~travel ~noise +worn +sport
ice skates: ~outdoors ~metal +sharp +worn +sport
surfboard: ~bigger -home +outdoors ~water +sport ~cost
kite: +outdoors ~cloth +fly ~children
doll: +home ~cloth ~soft +children
teddy bear: +home +cloth +soft +children
yo-yo: +pocket +home ~wood +round +children
marble: +pocket +home ~outdoors +round +children
toy brick: +pocket +home ~wood +children
toy car: +pocket +home ~metal +wheels ~electric +children
toy box: +home ~wood +store +children
dollhouse: +home ~wood +children
sandbox: ~bigger -home +outdoors ~wood +children
rocking horse: +wood ~legs +children
jigsaw puzzle: +home ~children
chess set: ~wood ~sport
dice: +pocket +home ~white
playing cards: +pocket +home
balloon: ~pocket ~outdoors ~soft +round ~fly ~children
jump rope: ~pocket ~outdoors ~sport +handle ~children
frisbee: +outdoors +round ~fly +sport
swing: ~bigger -home +outdoors ~wood ~metal +children
playground slide: ~bigger -home +outdoors ~metal +children ~cost
seesaw: +bigger -home +outdoors ~wood ~metal +children ~cost
trampoline: ~bigger ~outdoors ~metal ~round +sport ~children ~cost
dartboard: +round +sport
dart: ~pocket ~metal +sharp +sport
arrow: -home ~outdoors ~wood +sharp +sport
fishhook: +pocket -home ~outdoors ~water +metal +sharp +sport
fishing rod: ~bigger +outdoors +sport +handle
dumbbell: +metal +sport ~handle
boxing glove: +soft +worn +sport
parachute: +bigger -home +outdoors +cloth ~soft ~worn +sport +cost

= natural thing: +outdoors
mountain: +bigger +heavier
cave: +bigger +inside
river: +bigger +heavier ~travel ~noise ~sport
lake: +bigger +heavier ~round ~travel ~sport
sea: +bigger +heavier +travel +noise ~sport
island: +bigger +heavier +water
volcano: +bigger +heavier ~noise
waterfall: +bigger +heavier +noise
glacier: +bigger +heavier +white ~grow
moon: +bigger +heavier +round +white
sun: +bigger +heavier +round
cloud: +bigger +heavier +white
rain: ~noise
snow: +soft +white ~sport
icicle: +sharp ~grow
stone: ~pocket ~round
pebble: +pocket ~water +round
sand: ~water ~soft
mud: ~water +soft
gold: ~pocket ~home -outdoors +metal ~worn ~cost
diamond: ~made +pocket ~home -outdoors ~sharp ~worn +cost
emerald: ~made +pocket ~home -outdoors +green ~worn ~cost
rainbow: +bigger ~round
feather: +pocket ~home ~outdoors +soft ~white +grow
seashell: +pocket ~home ~water ~white
bird's nest: ~wood ~soft ~round
spider web: ~home ~soft ~round ~white

= everyday thing: +made +home
book: ~pocket
newspaper:
sheet of paper: ~pocket +white
envelope: ~pocket ~white +store
pen: +pocket ~metal
pencil: +pocket +wood ~sharp
eraser: +pocket ~soft ~white
ruler: ~pocket ~wood ~metal
key: +pocket +metal
coin: +pocket +metal +round
umbrella: ~outdoors +cloth ~round +handle
candle: ~pocket ~round ~white
match: +pocket ~kitchen +wood
towel: ~kitchen +cloth +soft ~white
tablecloth: ~kitchen +cloth ~soft ~white
handkerchief: +pocket +cloth +soft ~white
sleeping bag: ~bigger ~home ~outdoors +cloth +soft
soap: ~pocket ~kitchen ~white
toothbrush: +pocket ~soft ~electric +handle
comb: +pocket ~handle
hairbrush: ~sharp +handle
toothpaste: ~pocket +soft ~white ~sweet
razor: +pocket ~metal +sharp ~electric +handle
suitcase: ~wheels +handle +store
backpack: ~outdoors +cloth ~soft ~worn +store
handbag: ~cloth ~soft +handle +store
wallet: +pocket ~soft +store
basket: ~wood ~round ~handle +store
cardboard box: +store
trash can: ~kitchen ~outdoors ~metal ~round ~wheels ~store
wall clock: ~round ~noise ~electric
picture frame: ~wood ~metal
vase: ~round ~store
paper tissue: +pocket +soft +white
toilet paper: +soft +round +white
pacifier: +pocket ~soft ~round +children
lipstick: +pocket ~soft +worn
adhesive bandage: +pocket ~cloth ~soft +worn
pill: +pocket ~round ~white
sponge: ~pocket +kitchen +soft
button: +pocket +round ~worn
flag: -home +outdoors +cloth ~soft
globe: ~home +round
piggy bank: +store ~children
ball of wool: ~home +soft +round
walking stick: ~home ~outdoors ~wood +handle
coloring book: +children
barbed wire: -home +outdoors +metal +sharp
sword: -home +metal +sharp ~sport +handle ~cost
safe: ~home +metal +store ~cost
barrel: -home ~outdoors ~wood ~metal ~round +store
pencil case: ~cloth +store ~children
shopping bag: +handle +store
shopping cart: -home ~outdoors +metal +wheels +handle ~store
car tire: -home +outdoors +round
chalk: +pocket ~home +white
dollar bill: +pocket ~green
"""

_ANSWERS = {"+": "yes", "~": "sometimes", "-": "no"}


def _differences(words: str) -> dict[str, str]:
    differences: dict[str, str] = {}
    for word in words.split():
        name = word[1:]
        if word[0] not in _ANSWERS or name not in QUESTIONS or name in differences:
            raise ValueError(f"{word!r} in {words!r}: expected +, ~ or - and a question's short name, each once")
        differences[name] = _ANSWERS[word[0]]
    return differences


def build() -> list[dict[str, object]]:
    """Each object with its category and its answers in the order of the questions."""
    objects: list[dict[str, object]] = []
    category, defaults = "", {}
    for line in filter(None, TABLE.splitlines()):
        name, _, words = line.partition(":")
        if name.startswith("= "):
            category, defaults = name[2:], _differences(words)
            continue
        differences = _differences(words)
        for word, answer in differences.items():
            if defaults.get(word, "no") == answer:
                raise ValueError(f"{name}: {word} is {answer!r} already for every {category}")
        answers = {**dict.fromkeys(QUESTIONS, "no"), **defaults, **differences}
        objects.append({"name": name, "category": category, "answers": list(answers.values())})
    return objects


def as_json() -> str:
    """The data set's text, one line for each question and each object."""
    questions = ",\n".join(f"  {json.dumps(question)}" for question in QUESTIONS.values())
    objects = ",\n".join(f"  {json.dumps(game_object)}" for game_object in build())
    return f'{{\n "questions": [\n{questions}\n ],\n "objects": [\n{objects}\n ]\n}}\n'


if __name__ == "__main__":
    root = Path(__file__).parent.parent.parent
    (root / "attention_rl_trainer" / "memories" / "games" / "twenty_questions.json").write_text(as_json())
