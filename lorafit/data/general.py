"""Plain English text about ordinary things, written for lorafit: what any language model should still read well
after a fine-tune. Retention is measured on it unless the user names a text of their own.
"""

TEXTS = (
    "Water boils at a lower temperature on a mountain than at the sea, because there is less air above it to press on"
    " its surface. A cook who moves to the hills has to leave the potatoes in the pot a little longer. The difference"
    " is small in the foothills and large on a high plateau, where tea made with boiling water tastes weak.",
    "The library opened at nine. By ten the reading room was full of students, and the only sound was the turning of "
    "pages and now and then the scrape of a chair. An old man by the window had fallen asleep over a newspaper. "
    "Nobody woke him, since he came every morning and always left before lunch.",
    "To change a bicycle tube, first take the wheel out of the frame. Let out what air is left, and lift one side of "
    "the tyre over the rim with two levers. Pull out the old tube, and run a finger along the inside of the tyre to "
    "find whatever made the hole. Put a little air into the new tube before you push it in, so that it does not "
    "twist.",
    "A loan of one thousand at five percent a year grows to one thousand and fifty after one year if nothing is paid "
    "back. In the second year interest is due on the interest as well, and the debt comes to one thousand one hundred"
    " and two and a half. This is why a debt that looks harmless at first can double in less than fifteen years.",
    "Bees tell each other where flowers are by dancing on the comb. The direction of the dance shows the direction of"
    " the food compared with the sun, and its length shows the distance. A bee that has just come home will repeat "
    "the dance many times, while others follow her closely in the dark and then fly out on their own.",
    "Dear neighbour, our water will be turned off on Thursday between eight and twelve because of repairs in the "
    "street. Please fill a few bottles the evening before. If you need help carrying them, knock at our door on the "
    "second floor; we are at home after six. With kind regards, the family from number four.",
    "The moon has no light of its own. What we see is sunlight thrown back by grey dust and rock. When the moon "
    "stands between us and the sun, its bright side is turned away and we call it new; two weeks later the whole face"
    " is lit and rises in the east as the sun goes down. The tides follow it faithfully, twice a day.",
    "In a simple program a list can be sorted by comparing each pair of neighbours and swapping them when they stand "
    "in the wrong order. After enough passes nothing moves any more and the list is sorted. The method is easy to "
    "understand and slow for long lists, because the number of comparisons grows with the square of the length.",
    "She had packed a coat, two books and a bag of apples, and still the suitcase felt light. The train left on time."
    " Fields went by, then a river with barges, then the backs of houses where washing hung in the rain. At the "
    "border a guard looked at her passport, wished her a good journey and shut the door softly.",
    "Bread needs flour, water, salt and time. Mix the first three and leave the dough under a cloth until it has "
    "doubled. Fold it, shape it and let it rest again. A hot oven gives the crust its colour, and a cup of water on "
    "the bottom of the oven keeps the crust thin. Let the loaf cool before you cut it, however good it smells.",
    "The committee met on Monday to discuss the new bridge. The engineers explained that the old one could carry the "
    "traffic of today but not the heavier lorries expected in ten years. Two members asked for the cost of a ferry "
    "instead. The vote was put off until the figures for both could be laid side by side.",
    "A fever is not an illness but an answer to one. The body raises its own temperature because many germs grow more"
    " slowly in the heat. Rest and plenty to drink are usually enough. A doctor should be asked when the fever is "
    "very high, when it lasts longer than three days, or when a small child becomes drowsy.",
)
