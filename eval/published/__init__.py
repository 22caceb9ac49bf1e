"""Everything about one published checkpoint in one report: `blockffn verify-published`."""
