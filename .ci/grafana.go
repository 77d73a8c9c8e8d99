// Reads a dashboard for Grafana on stdin, and says what Grafana's own SDK finds wrong in it.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

func main() {
	plugins.RegisterDefaultPlugins()
	text, err := io.ReadAll(os.Stdin)
	if err == nil {
		err = new(dashboard.Dashboard).UnmarshalJSONStrict(text)
	}
	if err != nil && err.Error() != "" { // the SDK also returns lists of no errors
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
