"""Everything that the claims rest on, in one HTML file: `blockffn bench --report`."""
