"""What stands around a training loop: intervals, progress, reports."""

from fastmeta.train.meter import Interval as Interval
from fastmeta.train.meter import Progress as Progress
from fastmeta.train.meter import mean_interval as mean_interval
