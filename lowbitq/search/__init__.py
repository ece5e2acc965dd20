"""Searching the parameters of copies; Optuna is imported when a search begins."""

from lowbitq.search.objectives import TERMS as TERMS
from lowbitq.search.objectives import Objective as Objective
from lowbitq.search.objectives import Seen as Seen
from lowbitq.search.spaces import CLIPS as CLIPS
from lowbitq.search.spaces import GRID as GRID
from lowbitq.search.spaces import Space as Space
from lowbitq.search.spaces import read_space as read_space
from lowbitq.search.starts import complementary as complementary
from lowbitq.search.starts import inputs_of as inputs_of
from lowbitq.search.starts import progressive as progressive
from lowbitq.search.starts import static as static
from lowbitq.search.starts import symmetric as symmetric
from lowbitq.search.studies import SAMPLERS as SAMPLERS
from lowbitq.search.studies import Found as Found
from lowbitq.search.studies import search as search
