// Prints the data of every event of a stream, as Java's standard client reads it: Reader URL ENCODING

import java.io.ByteArrayOutputStream;
import java.io.InputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.util.zip.GZIPInputStream;

class Reader {
    public static void main(String[] arguments) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .header("Accept", "text/event-stream")
            .header("Accept-Encoding", arguments[1])
            .build();
        HttpResponse<InputStream> response =
            HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofInputStream());
        if (response.statusCode() != 200) throw new IllegalStateException("status " + response.statusCode());
        var encoding = response.headers().firstValue("Content-Encoding").orElse("identity");
        if (!encoding.equals(arguments[1])) throw new IllegalStateException("encoding " + encoding);
        var body = encoding.equals("gzip") ? new GZIPInputStream(response.body()) : response.body();
        // An InputStreamReader around a GZIPInputStream would wait for 8 KiB, since that always says that more is available.
        var line = new ByteArrayOutputStream();
        var bytes = new byte[4096];
        for (int count = body.read(bytes); count >= 0; count = body.read(bytes)) {
            for (int at = 0; at < count; at++) {
                line.write(bytes[at]);
                if (bytes[at] == '\n') print(line);
            }
        }
        System.exit(0);
    }

    static void print(ByteArrayOutputStream line) {
        var text = line.toString(StandardCharsets.UTF_8);
        if (text.startsWith("data: ")) System.out.print(text.substring(6));
        System.out.flush();
        line.reset();
    }
}
