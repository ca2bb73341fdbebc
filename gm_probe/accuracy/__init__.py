"""How accurate a classifier is on unlabeled data: scores of its outputs, their calibration, intervals, a ranking."""
