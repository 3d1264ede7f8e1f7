"""`sixfold report`: what happened in one run or several, as one HTML file that needs no network.

`story` reads run folders, `curves` and `picture` draw, `page` puts it together. Called by the command line;
nothing here looks into a run that is under way, or changes one.
"""
