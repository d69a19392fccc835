"""The pages, the site and what makes them: no part of the package."""
