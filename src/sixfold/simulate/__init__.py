"""Programs on a clock: what a schedule costs before anything runs, and how time looks as a picture.

Called by commands, reports and benchmarks; plays instructions on numbers alone and sends nothing.
"""

from sixfold.simulate.clock import simulate
from sixfold.simulate.costs import Costs, StageCosts
from sixfold.simulate.export import chrome_trace, html_page, lanes
from sixfold.simulate.measured import measured_costs, simulated_again
from sixfold.simulate.timeline import LANES, Event, Timeline, lane_of

__all__ = [
    "LANES",
    "Costs",
    "Event",
    "StageCosts",
    "Timeline",
    "chrome_trace",
    "html_page",
    "lane_of",
    "lanes",
    "measured_costs",
    "simulate",
    "simulated_again",
]
