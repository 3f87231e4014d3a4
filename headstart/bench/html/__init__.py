"""The parts of the HTML report: look of the runs, plots, table, sentences, template. `headstart.bench.html_report` joins them."""
