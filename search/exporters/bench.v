// Feeds samples from a file, one a line in hexadecimal, and writes what comes out.
`timescale 1ns/1ps

module bench;
    reg clk = 0;
    reg [@INPUT_BITS@-1:0] model_inp = 0;
    wire [@OUTPUT_BITS@-1:0] model_out;
    network dut (.clk(clk), .model_inp(model_inp), .model_out(model_out));

    reg [8*1024-1:0] from, to;
    integer source, target, sent, clocks;
    reg more;

    initial begin
        if (!$value$plusargs("inputs=%s", from) || !$value$plusargs("outputs=%s", to)) begin
            $display("give +inputs=FILE and +outputs=FILE");
            $finish;
        end
        source = $fopen(from, "r");
        target = $fopen(to, "w");
        sent = 0;
        clocks = 0;
        more = $fscanf(source, "%h", model_inp) == 1;
        while (more || clocks < sent + @STAGES@) begin
            if (more) sent = sent + 1;
            #1 clk = 1;
            #1 clk = 0;
            clocks = clocks + 1;
            if (clocks > @STAGES@) $fwrite(target, "%h\n", model_out);
            if (more) more = $fscanf(source, "%h", model_inp) == 1;
        end
        $fclose(target);
        $finish;
    end
endmodule
