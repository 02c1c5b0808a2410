"""Everything that knows an SGLang flag or URL: servers, sampling, scoring, weight syncs."""
