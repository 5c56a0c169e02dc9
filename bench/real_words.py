"""The names, words and sentences that the tasks on a pretrained model are made of; two halves of each never meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

T = TypeVar("T")
Part = Literal["calibration", "measured"]


def half(items: Sequence[T], part: Part) -> list[T]:
    """Every other one, from the first for the calibration and from the second for what is measured."""
    return list(items[part == "measured" :: 2])


def words(text: str) -> list[str]:
    return text.split()


def rows(text: str) -> list[tuple[str, ...]]:
    """Lines of things separated by commas."""
    return [tuple(cell.strip() for cell in line.split(",")) for line in text.strip().splitlines()]


def pairs(text: str) -> list[tuple[str, str]]:
    """Lines of two things."""
    return [(first, second) for first, second in rows(text)]


CAPITALS = pairs("""
    France, Paris
    Germany, Berlin
    Italy, Rome
    Spain, Madrid
    Portugal, Lisbon
    Japan, Tokyo
    Russia, Moscow
    China, Beijing
    Greece, Athens
    Egypt, Cairo
    Poland, Warsaw
    Austria, Vienna
    Hungary, Budapest
    Ireland, Dublin
    Norway, Oslo
    Sweden, Stockholm
    Finland, Helsinki
    Denmark, Copenhagen
    Belgium, Brussels
    Turkey, Ankara
    Iran, Tehran
    Iraq, Baghdad
    India, New Delhi
    Thailand, Bangkok
    Vietnam, Hanoi
    Indonesia, Jakarta
    Kenya, Nairobi
    Nigeria, Abuja
    Cuba, Havana
    Peru, Lima
    Chile, Santiago
    Argentina, Buenos Aires
    Canada, Ottawa
    Colombia, Bogotá
    Ukraine, Kyiv
    Switzerland, Bern
    Lebanon, Beirut
    Syria, Damascus
    Israel, Jerusalem
    Jordan, Amman
    Pakistan, Islamabad
    Afghanistan, Kabul
    Nepal, Kathmandu
    Bulgaria, Sofia
    Romania, Bucharest
    Croatia, Zagreb
    Serbia, Belgrade
    Iceland, Reykjavik
    Scotland, Edinburgh
    Wales, Cardiff
    Taiwan, Taipei
    Malaysia, Kuala Lumpur
    Venezuela, Caracas
    Ecuador, Quito
    Bolivia, La Paz
    Uruguay, Montevideo
    Ethiopia, Addis Ababa
    Morocco, Rabat
    Tunisia, Tunis
    Qatar, Doha
""")
OTHER_CITIES = words("""
    Boston Chicago Houston Seattle Denver Dallas Miami Atlanta Detroit Phoenix Munich Hamburg Milan Venice Naples Florence
    Barcelona Manchester Liverpool Birmingham Glasgow Bristol Sydney Melbourne Toronto Montreal Vancouver Mumbai Shanghai
""")
EVENTS = pairs("""
    the Titanic sank, 1912
    the First World War began, 1914
    the First World War ended, 1918
    the Second World War began, 1939
    the Second World War ended, 1945
    the Berlin Wall fell, 1989
    the first people landed on the Moon, 1969
    John F. Kennedy was assassinated, 1963
    India became independent, 1947
    the Soviet Union was dissolved, 1991
    the Russian Revolution took place, 1917
    the Wall Street Crash took place, 1929
    Pearl Harbor was attacked, 1941
    the Korean War began, 1950
    the Chernobyl disaster happened, 1986
    Martin Luther King Jr. was assassinated, 1968
    Sputnik was launched, 1957
    the Cuban Missile Crisis took place, 1962
    Einstein published special relativity, 1905
    penicillin was discovered, 1928
    Nelson Mandela was released from prison, 1990
    Hong Kong was returned to China, 1997
    Richard Nixon resigned as president, 1974
    the Spanish Civil War began, 1936
""")
FIRST_NAMES = words("""
    Alice Robert Clara Daniel Emma Frank Grace Henry Isabel James Karen Louis Maria Nathan Olivia Peter Rachel Samuel Teresa
    Victor Wendy Xavier Yvonne Zachary Anna Brian Cecilia David Elena George Helen Ivan Julia Kevin Laura Martin Nina Oscar
    Paula Quentin Rosa Simon Tanya Ulrich Vera Walter Agnes Boris Diana Edgar Fiona Gerald Hannah Igor Jasmine Kurt
""")
LAST_NAMES = words("""
    Carter Novak Fischer Moreau Rossi Silva Jensen Walsh Kovacs Petrov Tanaka Okafor Mendez Larsen Hughes Weber Costa Dubois
    Keller Santos Bishop Morgan Foster Greene Palmer Hayes Brooks Turner
""")
JOBS = words("""
    teacher doctor lawyer painter nurse baker farmer engineer pilot dentist architect carpenter journalist butcher tailor
    plumber librarian chemist sailor photographer electrician gardener translator accountant
""")
TOWNS = words(
    "Bristol Geneva Lyon Porto Gdansk Bergen Turin Leeds Salzburg Utrecht Malaga Aarhus Cork Graz Ghent Bilbao"
)
NOUNS = words("""
    anchor lantern pepper castle violin hammer orange tiger window bridge candle rocket garden mirror basket camera dragon
    engine feather guitar helmet island jacket kettle ladder magnet needle oyster pencil rabbit saddle tunnel umbrella valley
    wagon yellow zebra acorn bottle copper desert eagle forest gravel harbor ivory jungle kitten lemon marble nickel
    ocean parrot quartz ribbon silver turtle velvet walnut button cherry donkey emerald falcon ginger
""")
TRANSLATIONS = rows("""
    house, maison, casa, Haus
    dog, chien, perro, Hund
    water, eau, agua, Wasser
    book, livre, libro, Buch
    tree, arbre, árbol, Baum
    bread, pain, pan, Brot
    sun, soleil, sol, Sonne
    moon, lune, luna, Mond
    night, nuit, noche, Nacht
    day, jour, día, Tag
    hand, main, mano, Hand
    head, tête, cabeza, Kopf
    heart, coeur, corazón, Herz
    friend, ami, amigo, Freund
    love, amour, amor, Liebe
    woman, femme, mujer, Frau
    man, homme, hombre, Mann
    child, enfant, niño, Kind
    city, ville, ciudad, Stadt
    street, rue, calle, Straße
    door, porte, puerta, Tür
    red, rouge, rojo, rot
    white, blanc, blanco, weiß
    black, noir, negro, schwarz
    green, vert, verde, grün
    horse, cheval, caballo, Pferd
    bird, oiseau, pájaro, Vogel
    fish, poisson, pez, Fisch
    milk, lait, leche, Milch
    cheese, fromage, queso, Käse
    wine, vin, vino, Wein
    fire, feu, fuego, Feuer
    year, année, año, Jahr
    time, temps, tiempo, Zeit
    school, école, escuela, Schule
    church, église, iglesia, Kirche
    king, roi, rey, König
    queen, reine, reina, Königin
    world, monde, mundo, Welt
    life, vie, vida, Leben
    flower, fleur, flor, Blume
    sea, mer, mar, Meer
    mountain, montagne, montaña, Berg
    brother, frère, hermano, Bruder
    sister, soeur, hermana, Schwester
    mother, mère, madre, Mutter
    father, père, padre, Vater
    car, voiture, coche, Auto
""")
LIKED = words(
    "wonderful excellent delicious charming brilliant superb lovely delightful fantastic pleasant perfect amazing"
)
DISLIKED = words(
    "terrible awful disgusting boring dreadful horrible ugly annoying pathetic unpleasant disappointing nasty"
)
REVIEWED = words("soup film hotel concert novel breakfast play museum party garden coat lecture song room beach show")
OPPOSITES = pairs("""
    hot, cold
    big, small
    up, down
    black, white
    day, night
    young, old
    fast, slow
    happy, sad
    rich, poor
    hard, soft
    good, bad
    open, closed
    early, late
    strong, weak
    left, right
    high, low
    long, short
    light, dark
    full, empty
    clean, dirty
    first, last
    wet, dry
    thick, thin
    loud, quiet
    true, false
    inside, outside
    push, pull
    win, lose
    buy, sell
    love, hate
    front, back
    war, peace
    life, death
    wide, narrow
    deep, shallow
    begin, end
    male, female
    north, south
    east, west
    summer, winter
    accept, reject
    ancient, modern
    arrive, depart
    brave, cowardly
    cheap, expensive
    increase, decrease
    maximum, minimum
    positive, negative
    private, public
    major, minor
    simple, complex
    success, failure
    top, bottom
    victory, defeat
    sweet, sour
    remember, forget
    import, export
    same, different
    friend, enemy
    question, answer
""")
FOUND = words(
    "map key letter violin lantern diary clock mirror coin telescope statue bottle compass ring painting trunk"
)
PLACES = words(
    "desert harbor forest castle village library island cellar market museum valley lighthouse school monastery"
)
