"""core: what every room shares and what knows no model: the recipe, run folders, processes, statistics, pages."""
