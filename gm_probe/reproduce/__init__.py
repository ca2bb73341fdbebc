"""The paper's tables and figures: each a recipe (data), a study that it names, and a finding."""
